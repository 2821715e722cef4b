"""Llama and those close to it: Mistral, Qwen 2 and 3, and the mixtures of experts Mixtral and Qwen 3 MoE."""

from __future__ import annotations

from pyllm.families.family import Family, Weight
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
IGNORED = (r".*rotary_emb\.inv_freq",)


def linear(ours: str, *theirs: str) -> tuple[Weight, ...]:
    """The rows of a linear layer's weight and bias."""
    return tuple(Weight(f"{ours}.{kind}", tuple(f"{t}.{kind}" for t in theirs)) for kind in ("weight", "bias"))


OUTSIDE = (
    Weight("embedding.weight", ("model.embed_tokens.weight",)),
    Weight("norm.weight", ("model.norm.weight",)),
    Weight("head.weight", ("lm_head.weight",)),
)
ATTENTION = (
    Weight("blocks.{i}.attention_norm.weight", (f"{_LAYER}.input_layernorm.weight",)),
    *linear("blocks.{i}.attention.qkv", *(f"{_LAYER}.self_attn.{n}_proj" for n in "qkv")),
    *linear("blocks.{i}.attention.out", f"{_LAYER}.self_attn.o_proj"),
    Weight("blocks.{i}.attention.q_norm.weight", (f"{_LAYER}.self_attn.q_norm.weight",)),
    Weight("blocks.{i}.attention.k_norm.weight", (f"{_LAYER}.self_attn.k_norm.weight",)),
)
FEED_FORWARD_NORM = Weight("blocks.{i}.feed_forward_norm.weight", (f"{_LAYER}.post_attention_layernorm.weight",))
FEED_FORWARD = (
    *linear("blocks.{i}.feed_forward.up", f"{_LAYER}.mlp.gate_proj", f"{_LAYER}.mlp.up_proj"),
    *linear("blocks.{i}.feed_forward.down", f"{_LAYER}.mlp.down_proj"),
)
WEIGHTS = (*OUTSIDE, *ATTENTION, FEED_FORWARD_NORM, *FEED_FORWARD)


def sizes(config: dict) -> dict:
    """What all of these families' configs have in common."""
    heads, hidden = whole(config, "num_attention_heads"), whole(config, "hidden_size")
    return {
        "vocab_size": whole(config, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": whole(config, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": whole(config, "num_key_value_heads", heads),
        "head_dim": whole(config, "head_dim", max(hidden // heads, 1)),
        "intermediate_size": whole(config, "intermediate_size"),
        "context_length": whole(config, "max_position_embeddings"),
        "norm_eps": number(config, "rms_norm_eps", 1e-6),
    }


def read(config: dict, theta: float = 10000.0) -> dict:
    return sizes(config) | rope(config, theta) | {
        "activation": choice(config, "hidden_act", {"silu": "swiglu", "swish": "swiglu"}, "silu"),
        "tie_embeddings": flag(config, "tie_word_embeddings", False),
        "attention_dropout": fraction(config, "attention_dropout", 0.0),
    }  # fmt: skip


def write(model: Decoder) -> dict:
    c = model.config
    return {
        "vocab_size": c["vocab_size"],
        "hidden_size": c["hidden_size"],
        "num_hidden_layers": c["num_layers"],
        "num_attention_heads": c["num_heads"],
        "num_key_value_heads": c["num_kv_heads"] or c["num_heads"],
        "head_dim": c["head_dim"] or c["hidden_size"] // c["num_heads"],
        "intermediate_size": c["intermediate_size"],
        "max_position_embeddings": c["context_length"],
        "rms_norm_eps": c["norm_eps"],
        "hidden_act": "silu",
        "rope_parameters": to_rope(c),
        "tie_word_embeddings": c["tie_embeddings"],
        "attention_dropout": c["attention_dropout"],
    }


def _llama(config: dict) -> dict:
    bias = flag(config, "attention_bias", False)
    return read(config) | {"qkv_bias": bias, "bias": bias, "mlp_bias": flag(config, "mlp_bias", False)}


def _llama_config(model: Decoder) -> dict:
    c = model.config
    if c["qkv_bias"] != c["bias"]:
        raise ValueError("a 'llama' checkpoint must have biases on all of attention's layers or on none")
    return write(model) | {"attention_bias": c["bias"], "mlp_bias": c["mlp_bias"]}


def _mistral(config: dict) -> dict:
    return read(config) | {"window": whole(config, "sliding_window", optional=True)}


def _mistral_config(model: Decoder) -> dict:
    return write(model) | {"sliding_window": model.config["window"]}


def _qwen(config: dict) -> dict:
    layers, first = whole(config, "num_hidden_layers"), config.get("max_window_layers", 28)
    if not isinstance(first, int) or first < 0:
        raise ValueError(f"config: max_window_layers must be a whole number, but got {first!r}")
    window = whole(config, "sliding_window", 4096) if flag(config, "use_sliding_window", False) else None
    windowed = windowed_layers(config, layers, list(range(first, layers)))
    return read(config) | {"window": window, "window_layers": None if window is None else windowed}


def _qwen2(config: dict) -> dict:
    return _qwen(config) | {"qkv_bias": True}


def _qwen3(config: dict) -> dict:
    bias = flag(config, "attention_bias", False)
    return _qwen(config) | {"qkv_bias": bias, "bias": bias, "mlp_bias": False, "head_norm": True}


def _qwen_config(model: Decoder) -> dict:
    window = {"use_sliding_window": model.config["window"] is not None, "sliding_window": model.config["window"]}
    return write(model) | window | {"layer_types": layer_types(model.config)}


def _qwen3_config(model: Decoder) -> dict:
    return _qwen_config(model) | {"attention_bias": model.config["bias"]}


def mixture(theirs: str, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """The rows of the feed-forward layers of a mixture."""
    expert = f"{_LAYER}.{theirs}.experts.{{e}}"
    return (
        Weight("blocks.{i}.feed_forward.router.weight", (f"{_LAYER}.{theirs}.gate.weight",)),
        Weight("blocks.{i}.feed_forward.experts.{e}.up.weight", (f"{expert}.{gate}.weight", f"{expert}.{up}.weight")),
        Weight("blocks.{i}.feed_forward.experts.{e}.down.weight", (f"{expert}.{down}.weight",)),
    )


def _mixtral(config: dict) -> dict:
    fixed(config, "router_jitter_noise", 0.0)
    return read(config, 1e6) | {
        "window": whole(config, "sliding_window", optional=True),
        "num_experts": whole(config, "num_local_experts", 8),
        "active_experts": whole(config, "num_experts_per_tok", 2),
    }


def _mixtral_config(model: Decoder) -> dict:
    c = model.config
    experts = {"num_local_experts": c["num_experts"], "num_experts_per_tok": c["active_experts"]}
    return write(model) | experts | {"sliding_window": c["window"]}


def _qwen3_moe(config: dict) -> dict:
    fixed(config, "decoder_sparse_step", 1)
    if config.get("mlp_only_layers"):
        raise ValueError("config: mlp_only_layers must be empty: nothing else is known here, but got "
                         f"{config['mlp_only_layers']!r}")  # fmt: skip
    experts = whole(config, "num_experts", whole(config, "num_local_experts", 128))
    return _qwen3(config) | {
        "intermediate_size": whole(config, "moe_intermediate_size", 768),
        "num_experts": experts,
        "active_experts": whole(config, "num_experts_per_tok", 8),
        "normalised_experts": flag(config, "norm_topk_prob", False),
    }


def _qwen3_moe_config(model: Decoder) -> dict:
    c = model.config
    return _qwen3_config(model) | {
        "moe_intermediate_size": c["intermediate_size"],
        "num_experts": c["num_experts"],
        "num_experts_per_tok": c["active_experts"],
        "norm_topk_prob": c["normalised_experts"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _family(model_type, name, config, to_config, weights=WEIGHTS) -> Family:
    return Family(model_type, (f"{name}ForCausalLM",), Decoder, config, weights, to_config, IGNORED, "model.")


LLAMA = _family("llama", "Llama", _llama, _llama_config)
MISTRAL = _family("mistral", "Mistral", _mistral, _mistral_config)
QWEN2 = _family("qwen2", "Qwen2", _qwen2, _qwen_config)
QWEN3 = _family("qwen3", "Qwen3", _qwen3, _qwen3_config)
MIXTRAL = _family(
    "mixtral", "Mixtral", _mixtral, _mixtral_config,
    (*OUTSIDE, *ATTENTION, FEED_FORWARD_NORM, *mixture("block_sparse_moe", "w1", "w3", "w2")),
)  # fmt: skip
QWEN3_MOE = _family(
    "qwen3_moe", "Qwen3Moe", _qwen3_moe, _qwen3_moe_config,
    (*OUTSIDE, *ATTENTION, FEED_FORWARD_NORM, *mixture("mlp", "gate_proj", "up_proj", "down_proj")),
)  # fmt: skip
