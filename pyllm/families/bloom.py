"""BLOOM: attention biased by distance, and a norm of the embeddings."""

from __future__ import annotations

from pyllm.families.family import Family, Weight
from pyllm.families.gpt2 import both
from pyllm.families.settings import fixed, flag, fraction, number, whole
from pyllm.models import Decoder

_LAYER = "transformer.h.{i}"


def _config(config: dict) -> dict:
    fixed(config, "apply_residual_connection_post_layernorm", False)
    hidden = whole(config, "hidden_size", config.get("n_embed"))
    return {
        "vocab_size": whole(config, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": whole(config, "n_layer", config.get("num_hidden_layers")),
        "num_heads": whole(config, "n_head", config.get("num_attention_heads")),
        "intermediate_size": 4 * hidden,
        "context_length": whole(config, "seq_length", 2048),
        "position": "alibi",
        "embedding_norm": True,
        "norm": "layer_norm",
        "norm_eps": number(config, "layer_norm_epsilon", 1e-5),
        "activation": "gelu_tanh",
        "qkv_bias": True,
        "bias": True,
        "tie_embeddings": flag(config, "tie_word_embeddings", True),
        "dropout": fraction(config, "hidden_dropout", 0.0),
        "embedding_dropout": 0.0,
        "attention_dropout": fraction(config, "attention_dropout", 0.0),
    }


def _to_config(model: Decoder) -> dict:
    c = model.config
    return {
        "vocab_size": c["vocab_size"],
        "hidden_size": c["hidden_size"],
        "n_layer": c["num_layers"],
        "n_head": c["num_heads"],
        "seq_length": c["context_length"],
        "layer_norm_epsilon": c["norm_eps"],
        "tie_word_embeddings": c["tie_embeddings"],
        "hidden_dropout": c["dropout"],
        "attention_dropout": c["attention_dropout"],
    }


BLOOM = Family(
    "bloom",
    ("BloomForCausalLM",),
    Decoder,
    _config,
    (
        Weight("embedding.weight", ("transformer.word_embeddings.weight",)),
        *both("embedding_norm", "transformer.word_embeddings_layernorm"),
        *both("blocks.{i}.attention_norm", f"{_LAYER}.input_layernorm"),
        *both("blocks.{i}.attention.qkv", f"{_LAYER}.self_attention.query_key_value", by_head=True),
        *both("blocks.{i}.attention.out", f"{_LAYER}.self_attention.dense"),
        *both("blocks.{i}.feed_forward_norm", f"{_LAYER}.post_attention_layernorm"),
        *both("blocks.{i}.feed_forward.up", f"{_LAYER}.mlp.dense_h_to_4h"),
        *both("blocks.{i}.feed_forward.down", f"{_LAYER}.mlp.dense_4h_to_h"),
        *both("norm", "transformer.ln_f"),
        Weight("head.weight", ("lm_head.weight",)),
    ),
    _to_config,
    prefix="transformer.",
)
