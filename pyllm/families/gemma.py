"""Gemma 2 and 3: scaled embeddings, norms by 1 + weight before and after layers, windows in most layers, softcaps."""

from __future__ import annotations

from pyllm.families.family import Family, Weight
from pyllm.families.llama import ATTENTION, FEED_FORWARD, IGNORED, OUTSIDE, sizes
from pyllm.families.settings import (
    choice,
    fixed,
    flag,
    fraction,
    layer_types,
    number,
    rope,
    to_rope,
    whole,
    windowed_layers,
)
from pyllm.models import Decoder

_LAYER = "model.layers.{i}"
_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_post_norm": "post_feedforward_layernorm",
}
WEIGHTS = (
    *OUTSIDE,
    *ATTENTION,
    *(Weight(f"blocks.{{i}}.{ours}.weight", (f"{_LAYER}.{theirs}.weight",)) for ours, theirs in _NORMS.items()),
    *FEED_FORWARD,
)
_ACTIVATIONS = {"gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh", "gelu": "geglu"}


def _common(config: dict, every: int) -> dict:
    """`every`: this one of so many layers, the last of them, sees all keys, where layer_types does not say."""
    fixed(config, "use_bidirectional_attention", False)
    common = sizes(config | {"head_dim": whole(config, "head_dim", 256)})
    layers, bias = common["num_layers"], flag(config, "attention_bias", False)
    return common | {
        "window": whole(config, "sliding_window", 4096),
        "window_layers": windowed_layers(config, layers, [i for i in range(layers) if (i + 1) % every]),
        "attention_scale": number(config, "query_pre_attn_scalar", 256) ** -0.5,
        "norm": "one_plus_rms_norm",
        "post_norms": True,
        "activation": choice(config, "hidden_activation", _ACTIVATIONS, "gelu_pytorch_tanh"),
        "qkv_bias": bias,
        "bias": bias,
        "mlp_bias": False,
        "embedding_scale": common["hidden_size"] ** 0.5,
        "tie_embeddings": flag(config, "tie_word_embeddings", True),
        "attention_dropout": fraction(config, "attention_dropout", 0.0),
    }


def _gemma2(config: dict) -> dict:
    softcaps = {
        "attention_softcap": number(config, "attn_logit_softcapping", 50.0 if _absent(config, "attn") else None,
                                    optional=True),
        "logit_softcap": number(config, "final_logit_softcapping", 30.0 if _absent(config, "final") else None,
                                optional=True),
    }  # fmt: skip
    return _common(config, 2) | rope(config) | softcaps


def _absent(config: dict, which: str) -> bool:
    return f"{which}_logit_softcapping" not in config


def _gemma3(config: dict) -> dict:
    by_layer = config.get("rope_parameters")
    if isinstance(by_layer, dict) and {"full_attention", "sliding_attention"} <= by_layer.keys():
        full = rope({**config, "rope_parameters": by_layer["full_attention"]}, 1e6)
        local = rope({"rope_parameters": by_layer["sliding_attention"]})
        if local["rope_scaling"] is not None:
            raise ValueError("config: rope_parameters: sliding_attention must not be scaled, but got "
                             f"{by_layer['sliding_attention']!r}")  # fmt: skip
        theta = local["rope_theta"]
    else:
        full, theta = rope(config, 1e6), number(config, "rope_local_base_freq", 10000.0)
    # No softcap is in the attention of these: the setting is kept by configs, but not used.
    softcap = number(config, "final_logit_softcapping", optional=True)
    every = whole(config, "sliding_window_pattern", 6)
    return _common(config, every) | full | {"window_rope_theta": theta, "head_norm": True, "logit_softcap": softcap}


def _to_config(model: Decoder) -> dict:
    c = model.config
    return {
        "vocab_size": c["vocab_size"],
        "hidden_size": c["hidden_size"],
        "num_hidden_layers": c["num_layers"],
        "num_attention_heads": c["num_heads"],
        "num_key_value_heads": c["num_kv_heads"],
        "head_dim": c["head_dim"],
        "intermediate_size": c["intermediate_size"],
        "max_position_embeddings": c["context_length"],
        "rms_norm_eps": c["norm_eps"],
        "hidden_activation": {"geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh"}[c["activation"]],
        "sliding_window": c["window"],
        "layer_types": layer_types(c),
        "query_pre_attn_scalar": round(c["attention_scale"] ** -2),
        "attention_bias": c["bias"],
        "attn_logit_softcapping": c["attention_softcap"],
        "final_logit_softcapping": c["logit_softcap"],
        "rope_parameters": to_rope(c),
        "tie_word_embeddings": c["tie_embeddings"],
        "attention_dropout": c["attention_dropout"],
    }


def _gemma3_to_config(model: Decoder) -> dict:
    local = {"rope_type": "default", "rope_theta": model.config["window_rope_theta"]}
    config = _to_config(model)
    return config | {
        "rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local},
        "rope_theta": model.config["rope_theta"],
        "rope_local_base_freq": model.config["window_rope_theta"],
    }


GEMMA2 = Family("gemma2", ("Gemma2ForCausalLM",), Decoder, _gemma2, WEIGHTS, _to_config, IGNORED, "model.")
GEMMA3 = Family("gemma3_text", ("Gemma3ForCausalLM",), Decoder, _gemma3, WEIGHTS, _gemma3_to_config, IGNORED, "model.")
