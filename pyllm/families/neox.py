"""GPT-NeoX and Pythia: attention and feed-forward layer in parallel, a part of each head rotated."""

from __future__ import annotations

from pyllm.families.family import Family, Weight
from pyllm.families.gpt2 import ACTIVATIONS, NAMES, both
from pyllm.families.settings import choice, flag, fraction, number, rope, rotary_dim, to_rope, whole
from pyllm.models import Decoder

_LAYER = "gpt_neox.layers.{i}"


def _config(config: dict) -> dict:
    hidden, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    bias = flag(config, "attention_bias", True)
    base = number(config, "rotary_emb_base", 10000.0)
    return {
        "vocab_size": whole(config, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": whole(config, "num_hidden_layers"),
        "num_heads": heads,
        "intermediate_size": whole(config, "intermediate_size"),
        "context_length": whole(config, "max_position_embeddings"),
        "rotary_dim": rotary_dim(config, hidden // heads, number(config, "rotary_pct", 0.25)),
        "norm": "layer_norm",
        "norm_eps": number(config, "layer_norm_eps", 1e-5),
        "parallel_residual": flag(config, "use_parallel_residual", True),
        "activation": choice(config, "hidden_act", ACTIVATIONS, "gelu"),
        "qkv_bias": bias,
        "bias": bias,
        "mlp_bias": True,
        "tie_embeddings": flag(config, "tie_word_embeddings", False),
        "dropout": fraction(config, "hidden_dropout", 0.0),
        "attention_dropout": fraction(config, "attention_dropout", 0.0),
    } | rope(config, base)


def _to_config(model: Decoder) -> dict:
    c = model.config
    part = (c["rotary_dim"] or c["hidden_size"] // c["num_heads"]) / (c["hidden_size"] // c["num_heads"])
    return {
        "vocab_size": c["vocab_size"],
        "hidden_size": c["hidden_size"],
        "num_hidden_layers": c["num_layers"],
        "num_attention_heads": c["num_heads"],
        "intermediate_size": c["intermediate_size"],
        "max_position_embeddings": c["context_length"],
        "rotary_pct": part,
        "rotary_emb_base": c["rope_theta"],
        "rope_parameters": to_rope(c) | {"partial_rotary_factor": part},
        "layer_norm_eps": c["norm_eps"],
        "use_parallel_residual": c["parallel_residual"],
        "hidden_act": NAMES[c["activation"]],
        "attention_bias": c["bias"],
        "tie_word_embeddings": c["tie_embeddings"],
        "hidden_dropout": c["dropout"],
        "attention_dropout": c["attention_dropout"],
    }


NEOX = Family(
    "gpt_neox",
    ("GPTNeoXForCausalLM",),
    Decoder,
    _config,
    (
        Weight("embedding.weight", ("gpt_neox.embed_in.weight",)),
        *both("blocks.{i}.attention_norm", f"{_LAYER}.input_layernorm"),
        *both("blocks.{i}.attention.qkv", f"{_LAYER}.attention.query_key_value", by_head=True),
        *both("blocks.{i}.attention.out", f"{_LAYER}.attention.dense"),
        *both("blocks.{i}.feed_forward_norm", f"{_LAYER}.post_attention_layernorm"),
        *both("blocks.{i}.feed_forward.up", f"{_LAYER}.mlp.dense_h_to_4h"),
        *both("blocks.{i}.feed_forward.down", f"{_LAYER}.mlp.dense_4h_to_h"),
        *both("norm", "gpt_neox.final_layer_norm"),
        Weight("head.weight", ("embed_out.weight",)),
    ),
    _to_config,
    ignored=(r".*attention\.(masked_)?bias", r".*rotary_emb\.inv_freq"),
    prefix="gpt_neox.",
)
