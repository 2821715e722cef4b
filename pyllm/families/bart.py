"""BART: the original Transformer with learned positions, whose rows begin at 2, and normalised embeddings."""

from __future__ import annotations

import warnings

from pyllm.families.family import Family, Weight
from pyllm.families.gpt2 import both
from pyllm.families.settings import answer_ids, choice, fixed, flag, fraction, to_answer_ids, whole
from pyllm.models import EncoderDecoder

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}


def read(config: dict) -> dict:
    """What BART's and Marian's configs have in common."""
    fixed(config, "is_encoder_decoder", True)
    fixed(config, "tie_word_embeddings", True)
    fixed(config, "normalize_before", False)
    fixed(config, "add_final_layer_norm", False)
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        if fraction(config, name, 0.0):
            warnings.warn(f"config: {name} is {config[name]}, but no layers are left out here: training goes another "
                          "way than where the checkpoint comes from", stacklevel=2)  # fmt: skip
    vocab, hidden = whole(config, "vocab_size"), whole(config, "d_model")
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_layers": whole(config, "decoder_layers"),
        "num_heads": whole(config, "decoder_attention_heads"),
        "encoder_num_layers": whole(config, "encoder_layers"),
        "encoder_num_heads": whole(config, "encoder_attention_heads"),
        "intermediate_size": whole(config, "decoder_ffn_dim"),
        "encoder_intermediate_size": whole(config, "encoder_ffn_dim"),
        "context_length": whole(config, "max_position_embeddings", 1024),
        "norm": "layer_norm",
        "norm_eps": 1e-5,
        "post_norm": True,
        "activation": choice(config, "activation_function", ACTIVATIONS, "gelu"),
        "bias": True,
        "embedding_scale": hidden**0.5 if flag(config, "scale_embedding", False) else None,
        "head_bias": True,
        "dropout": fraction(config, "dropout", 0.1),
        "attention_dropout": fraction(config, "attention_dropout", 0.0),
        "activation_dropout": fraction(config, "activation_dropout", 0.0),
    } | answer_ids(config, vocab)


def write(model: EncoderDecoder) -> dict:
    """The reverse of `read`."""
    c = model.config
    return {
        "is_encoder_decoder": True,
        "tie_word_embeddings": c["tie_embeddings"],
        "vocab_size": c["vocab_size"],
        "d_model": c["hidden_size"],
        "decoder_layers": c["num_layers"],
        "decoder_attention_heads": c["num_heads"],
        "encoder_layers": c["encoder_num_layers"],
        "encoder_attention_heads": c["encoder_num_heads"],
        "decoder_ffn_dim": c["intermediate_size"],
        "encoder_ffn_dim": c["encoder_intermediate_size"],
        "max_position_embeddings": c["context_length"],
        "activation_function": _NAMES[c["activation"]],
        "scale_embedding": c["embedding_scale"] is not None,
        "dropout": c["dropout"],
        "attention_dropout": c["attention_dropout"],
        "activation_dropout": c["activation_dropout"],
    } | to_answer_ids(c)


def _config(config: dict) -> dict:
    fixed(config, "normalize_embedding", True)
    fixed(config, "static_position_embeddings", False)
    common = read(
        {"pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2} | config
    )
    return common | {"position": "learned", "position_offset": 2, "embedding_norm": True}


def _side(side: str) -> tuple[Weight, ...]:
    block, layer = f"{side}.blocks.{{i}}", f"model.{side}.layers.{{i}}"
    rows = [
        Weight(f"{side}.position_embedding.weight", (f"model.{side}.embed_positions.weight",)),
        *both(f"{side}.embedding_norm", f"model.{side}.layernorm_embedding"),
    ]
    for ours, theirs in (("attention", "self_attn"), ("cross_attention", "encoder_attn")):
        for kind in ("weight", "bias"):
            q, k, v, out = (f"{layer}.{theirs}.{part}.{kind}" for part in ("q_proj", "k_proj", "v_proj", "out_proj"))
            parts = {"qkv": (q, k, v), "query": (q,), "kv": (k, v), "out": (out,)}
            rows += [Weight(f"{block}.{ours}.{part}.{kind}", names) for part, names in parts.items()]
        rows += both(f"{block}.{ours}_norm", f"{layer}.{theirs}_layer_norm")
    return (
        *rows,
        *both(f"{block}.feed_forward.up", f"{layer}.fc1"),
        *both(f"{block}.feed_forward.down", f"{layer}.fc2"),
        *both(f"{block}.feed_forward_norm", f"{layer}.final_layer_norm"),
    )


WEIGHTS = (
    Weight("embedding.weight", ("model.shared.weight",)),
    Weight("head.weight", ("lm_head.weight",)),
    Weight("head.bias", ("final_logits_bias",), as_row=True, optional=True),
    *_side("encoder"),
    *_side("decoder"),
)
OLDER = ((r"^(model\.)?(en|de)coder\.embed_tokens\.weight$", r"\1shared.weight"),)

BART = Family(
    "bart",
    ("BartForConditionalGeneration", "BartModel"),
    EncoderDecoder,
    _config,
    WEIGHTS,
    write,
    ignored=(r"(model\.)?(en|de)coder\.version",),
    prefix="model.",
    older=OLDER,
)
