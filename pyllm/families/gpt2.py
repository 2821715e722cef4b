"""GPT-2: learned positions, layer norms, biases everywhere."""

from __future__ import annotations

from pyllm.families.family import Family, Weight
from pyllm.families.settings import choice, fixed, flag, fraction, number, whole
from pyllm.models import Decoder

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
               "silu": "silu"}  # fmt: skip
NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu"}
_LAYER = "transformer.h.{i}"


def both(ours: str, theirs: str, **options: bool) -> tuple[Weight, Weight]:
    """The rows of a layer's weight, with options, and bias, of which only by_head concerns it."""
    return (Weight(f"{ours}.weight", (f"{theirs}.weight",), **options),
            Weight(f"{ours}.bias", (f"{theirs}.bias",), by_head=options.get("by_head", False)))  # fmt: skip


def _config(config: dict) -> dict:
    fixed(config, "scale_attn_weights", True)
    fixed(config, "scale_attn_by_inverse_layer_idx", False)
    fixed(config, "add_cross_attention", False)
    hidden = whole(config, "n_embd")
    return {
        "vocab_size": whole(config, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": whole(config, "n_layer"),
        "num_heads": whole(config, "n_head"),
        "intermediate_size": whole(config, "n_inner", 4 * hidden),
        "context_length": whole(config, "n_positions", 1024),
        "position": "learned",
        "norm": "layer_norm",
        "norm_eps": number(config, "layer_norm_epsilon", 1e-5),
        "activation": choice(config, "activation_function", ACTIVATIONS, "gelu_new"),
        "qkv_bias": True,
        "bias": True,
        "tie_embeddings": flag(config, "tie_word_embeddings", True),
        "dropout": fraction(config, "resid_pdrop", 0.1),
        "embedding_dropout": fraction(config, "embd_pdrop", 0.1),
        "attention_dropout": fraction(config, "attn_pdrop", 0.1),
    }


def _to_config(model: Decoder) -> dict:
    c = model.config
    return {
        "vocab_size": c["vocab_size"],
        "n_embd": c["hidden_size"],
        "n_layer": c["num_layers"],
        "n_head": c["num_heads"],
        "n_inner": c["intermediate_size"],
        "n_positions": c["context_length"],
        "n_ctx": c["context_length"],
        "layer_norm_epsilon": c["norm_eps"],
        "activation_function": NAMES[c["activation"]],
        "tie_word_embeddings": c["tie_embeddings"],
        "resid_pdrop": c["dropout"],
        "embd_pdrop": c["embedding_dropout"],
        "attn_pdrop": c["attention_dropout"],
    }


GPT2 = Family(
    "gpt2",
    ("GPT2LMHeadModel",),
    Decoder,
    _config,
    (
        Weight("embedding.weight", ("transformer.wte.weight",)),
        Weight("position_embedding.weight", ("transformer.wpe.weight",)),
        *both("blocks.{i}.attention_norm", f"{_LAYER}.ln_1"),
        *both("blocks.{i}.attention.qkv", f"{_LAYER}.attn.c_attn", transposed=True),
        *both("blocks.{i}.attention.out", f"{_LAYER}.attn.c_proj", transposed=True),
        *both("blocks.{i}.feed_forward_norm", f"{_LAYER}.ln_2"),
        *both("blocks.{i}.feed_forward.up", f"{_LAYER}.mlp.c_fc", transposed=True),
        *both("blocks.{i}.feed_forward.down", f"{_LAYER}.mlp.c_proj", transposed=True),
        *both("norm", "transformer.ln_f"),
        Weight("head.weight", ("lm_head.weight",)),
    ),
    _to_config,
    ignored=(r"(transformer\.)?h\.[0-9]+\.attn\.(masked_)?bias",),
    prefix="transformer.",
)
