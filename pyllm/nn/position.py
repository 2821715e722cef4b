"""Positions: the frequencies that rotary ones turn by, also scaled for long texts, and the slopes of linear biases."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

SCALINGS = ("linear", "dynamic", "llama3", "yarn")


def rope_frequencies(theta: float, rotary_dim: int, scaling: dict[str, Any] | None) -> tuple[Tensor, float]:
    """(frequencies (rotary_dim / 2,) in float64, factor for what is turned), for `ops.rope`.

    Args:
        theta: the base of the frequencies.
        scaling: None, or rope_type and its settings, under the names that Hugging Face configs give them. "linear"
            slows all frequencies by `factor`. "llama3" does so for wavelengths that the first training's length
            (`original_max_position_embeddings`) holds fewer than `low_freq_factor` times, with a smooth passage up to
            `high_freq_factor`. "yarn" (Peng et al., 2023, https://arxiv.org/abs/2309.00071) passes linearly between
            the dimensions that turn `beta_slow` and `beta_fast` times, and sharpens attention. "dynamic" would change
            what was cached as a text grows beyond the model's context; up to there it is the unscaled form.

    Raises:
        ValueError: a scaling that is not one of these, or a setting that it lacks.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim
    frequencies = theta**-exponents
    if scaling is None:
        return frequencies, 1.0
    kind = scaling.get("rope_type")
    if kind not in SCALINGS:
        raise ValueError(f"rope_scaling's rope_type must be one of {', '.join(SCALINGS)}, but got {kind!r}")
    if kind == "dynamic":
        return frequencies, 1.0
    factor = _setting(scaling, "factor")
    if kind == "linear":
        return frequencies / factor, 1.0
    original = _setting(scaling, "original_max_position_embeddings")
    if kind == "llama3":
        low, high = _setting(scaling, "low_freq_factor"), _setting(scaling, "high_freq_factor")
        turns = original * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / factor), 1.0
    fast, slow = _setting(scaling, "beta_fast", 32.0), _setting(scaling, "beta_slow", 1.0)
    first, last = (rotary_dim * math.log(original / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in (fast, slow))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    steps = torch.arange(rotary_dim // 2, dtype=torch.float64, device="cpu")
    slowed = ((steps - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies * (1 - slowed + slowed / factor), _yarn_scale(scaling, factor)


def alibi_slopes(num_heads: int) -> Tensor:
    """(num_heads,) in float32: how much a head's scores rise with each position (Press et al., 2021,
    https://arxiv.org/abs/2108.12409). Where the number of heads is no power of two, those beyond the last such number
    take every other slope of twice as many."""
    whole = 2 ** (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / whole) for i in range(1, whole + 1)]
    slopes += [2 ** (-4 * i / whole) for i in range(1, 2 * (num_heads - whole), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")


def _yarn_scale(scaling: dict[str, Any], factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return _setting(scaling, "attention_factor")

    def sharper(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return sharper(_setting(scaling, "mscale")) / sharper(_setting(scaling, "mscale_all_dim"))
    return sharper(1.0)


def _setting(scaling: dict[str, Any], name: str, default: float | None = None) -> float:
    value = scaling.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"rope_scaling's {name} must be a number above 0, but got {value!r}")
    return float(value)
