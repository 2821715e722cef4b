"""Phi-3: Llama with query, key and value, and gate and up, stored as one."""

from __future__ import annotations

from pyllm.families.family import Family
from pyllm.families.llama import ATTENTION, FEED_FORWARD_NORM, IGNORED, OUTSIDE, linear, read, write
from pyllm.families.settings import fraction, rotary_dim, whole
from pyllm.models import Decoder


def _config(config: dict) -> dict:
    common = read(_named(config))
    return common | {
        "window": whole(config, "sliding_window", optional=True),
        "rotary_dim": rotary_dim(config, common["head_dim"]),
        "dropout": fraction(config, "resid_pdrop", 0.0),
        "embedding_dropout": 0.0,  # embd_pdrop is kept by configs, but not used
    }


def _named(config: dict) -> dict:
    """Older configs have other names for longrope."""
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    found = config.get(key)
    if isinstance(found, dict):
        kind = found.get("rope_type", found.get("type"))
        if kind in ("su", "yarn"):
            return {**config, key: {**found, "rope_type": "longrope"}}
    return config


def _to_config(model: Decoder) -> dict:
    config = write(model)
    scaling = model.config["rope_scaling"] or {}
    original = scaling.get("original_max_position_embeddings", config["max_position_embeddings"])
    if scaling.get("rope_type") == "longrope":
        config["max_position_embeddings"] = max(round(original * scaling["factor"]), config["max_position_embeddings"])
    part = (model.config["rotary_dim"] or config["head_dim"]) / config["head_dim"]
    return config | {
        "rope_parameters": config["rope_parameters"] | {"partial_rotary_factor": part},
        "partial_rotary_factor": part,
        "original_max_position_embeddings": original,
        "sliding_window": model.config["window"],
        "resid_pdrop": model.config["dropout"],
        "pad_token_id": None,  # otherwise it would be 32000, whatever the vocabulary
    }


PHI3 = Family(
    "phi3",
    ("Phi3ForCausalLM",),
    Decoder,
    _config,
    (
        *OUTSIDE,
        *linear("blocks.{i}.attention.qkv", "model.layers.{i}.self_attn.qkv_proj"),
        *ATTENTION,
        FEED_FORWARD_NORM,
        *linear("blocks.{i}.feed_forward.up", "model.layers.{i}.mlp.gate_up_proj"),
        *linear("blocks.{i}.feed_forward.down", "model.layers.{i}.mlp.down_proj"),
    ),
    _to_config,
    IGNORED,
    "model.",
)
