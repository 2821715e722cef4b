"""RWKV-7 "Goose", as the Flash Linear Attention project's models on the Hugging Face hub have it."""

from __future__ import annotations

from pyllm.families.family import Family, Weight
from pyllm.families.gpt2 import both
from pyllm.families.settings import fixed, flag, number, whole
from pyllm.models import RWKV

_LAYER = "model.layers.{i}"
_TIME, _OURS = f"{_LAYER}.attn", "blocks.{i}.time_mix"
_LINEAR = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
_LOW_RANK = {"decay": "w_lora", "rate": "a_lora", "value_mix": "v_lora", "gate": "g_lora"}
_VECTORS = {"removal": "k_k", "replacement": "k_a", "bonus": "r_k"}


def _config(config: dict) -> dict:
    fixed(config, "attn", None)
    fixed(config, "hidden_act", "sqrelu")
    hidden, layers = whole(config, "hidden_size"), whole(config, "num_hidden_layers")
    fixed(config, "value_dim", [hidden] * layers)
    head_dim = whole(config, "head_dim", 64)
    fixed(config, "num_heads", hidden // head_dim)
    wide = int(hidden * number(config, "hidden_ratio", 4))
    return {
        "vocab_size": whole(config, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": layers,
        "head_dim": head_dim,
        "intermediate_size": whole(config, "intermediate_size", (wide + 31) // 32 * 32),
        "decay_rank": whole(config, "decay_low_rank_dim", 64),
        "rate_rank": whole(config, "a_low_rank_dim", 64),
        "value_rank": whole(config, "v_low_rank_dim", 16),
        "gate_rank": whole(config, "gate_low_rank_dim", 128),
        "norm_eps": number(config, "norm_eps", 1e-5),
        "norm_bias": flag(config, "norm_bias", True),
        "embedding_norm": flag(config, "norm_first", True),
        "tie_embeddings": flag(config, "tie_word_embeddings", False),
    }


def _to_config(model: RWKV) -> dict:
    c = model.config
    return {
        "vocab_size": c["vocab_size"],
        "hidden_size": c["hidden_size"],
        "num_hidden_layers": c["num_layers"],
        "head_dim": c["head_dim"],
        "num_heads": c["hidden_size"] // c["head_dim"],
        "value_dim": [c["hidden_size"]] * c["num_layers"],
        "intermediate_size": c["intermediate_size"],
        "hidden_ratio": c["intermediate_size"] / c["hidden_size"],
        "hidden_act": "sqrelu",
        "decay_low_rank_dim": c["decay_rank"],
        "a_low_rank_dim": c["rate_rank"],
        "v_low_rank_dim": c["value_rank"],
        "gate_low_rank_dim": c["gate_rank"],
        "norm_eps": c["norm_eps"],
        "norm_bias": c["norm_bias"],
        "norm_first": c["embedding_norm"],
        "tie_word_embeddings": c["tie_embeddings"],
    }


RWKV7 = Family(
    "rwkv7",
    ("RWKV7ForCausalLM",),
    RWKV,
    _config,
    (
        Weight("embedding.weight", ("model.embeddings.weight",)),
        *both("embedding_norm", "model.layers.0.pre_norm"),
        *both("blocks.{i}.time_norm", f"{_LAYER}.attn_norm"),
        Weight(f"{_OURS}.mix", tuple(f"{_TIME}.x_{part}" for part in "rwkvag")),
        *(Weight(f"{_OURS}.{ours}.weight", (f"{_TIME}.{theirs}.weight",)) for ours, theirs in _LINEAR.items()),
        *(Weight(f"{_OURS}.{ours}.down.weight", (f"{_TIME}.{theirs}.lora.0.weight",))
          for ours, theirs in _LOW_RANK.items()),
        *(w for ours, theirs in _LOW_RANK.items() for w in both(f"{_OURS}.{ours}.up", f"{_TIME}.{theirs}.lora.2")),
        *(Weight(f"{_OURS}.{ours}", (f"{_TIME}.{theirs}",)) for ours, theirs in _VECTORS.items()),
        *both(f"{_OURS}.norm", f"{_TIME}.g_norm"),
        *both("blocks.{i}.channel_norm", f"{_LAYER}.ffn_norm"),
        Weight("blocks.{i}.channel_mix.mix", (f"{_LAYER}.ffn.x_k",)),
        Weight("blocks.{i}.channel_mix.feed_forward.up.weight", (f"{_LAYER}.ffn.key.weight",)),
        Weight("blocks.{i}.channel_mix.feed_forward.down.weight", (f"{_LAYER}.ffn.value.weight",)),
        *both("norm", "model.norm"),
        Weight("head.weight", ("lm_head.weight",)),
    ),
    _to_config,
    prefix="model.",
)  # fmt: skip
