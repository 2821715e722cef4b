"""Positions: the frequencies that rotary ones turn by, also scaled for long texts, the slopes of linear biases, biases
by distance, and sines."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyllm.nn.embedding import Embedding

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


class RelativeBias(Embedding):
    """A learned bias of attention's scores by the distance of query and key, as in T5 (Raffel et al., 2020,
    https://arxiv.org/abs/1910.10683).

    Near distances have a bucket each, farther ones share buckets that widen up to `max_distance`, and all beyond are in
    the last. Unless it is causal, half of the buckets are for keys that come after the query.

    The queries' positions, (T,) or (B, T) -> (1 or B, num_heads, T, K), for keys at 0 to the last query's position.
    """

    def __init__(self, num_heads: int, num_buckets: int = 32, max_distance: int = 128, *, causal: bool):
        super().__init__(num_buckets, num_heads)
        one_side = num_buckets if causal else num_buckets // 2
        if not 1 <= one_side // 2 < max_distance <= 65536:
            raise ValueError("num_buckets must be 4 or more, and max_distance more than half of those for one side and "
                             f"at most 65536, but got {num_buckets} and {max_distance}")  # fmt: skip
        self.max_distance = max_distance
        before = _distance_buckets(one_side, max_distance)
        after = torch.zeros_like(before) if causal else before + one_side
        self.buckets = torch.cat((before.flip(0), after[1:]))  # of the distances -max_distance to max_distance

    def forward(self, positions: Tensor) -> Tensor:
        positions = positions.view(-1, positions.shape[-1])
        if (positions == positions[:1]).all():
            positions = positions[:1]
        distances = torch.arange(int(positions.max()) + 1) - positions[..., None]  # (1 or B, T, K)
        buckets = self.buckets[distances.clamp(-self.max_distance, self.max_distance) + self.max_distance]
        return super().forward(buckets).permute(0, 3, 1, 2).contiguous()


class SinusoidalEmbedding(torch.nn.Module):
    """Positions (...) -> (..., hidden_size): sines, then cosines, of ever lower frequencies (Vaswani et al., 2017,
    https://arxiv.org/abs/1706.03762). Nothing is learned, and no position is too far."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size
        self.rows = torch.empty(0, hidden_size, device="cpu")

    def forward(self, positions: Tensor) -> Tensor:
        known, needed = len(self.rows), int(positions.max()) + 1
        if needed > known:
            new = torch.arange(known, -(-needed // 64) * 64, dtype=torch.float64)[:, None]
            halves = torch.arange(0, self.hidden_size, 2, dtype=torch.float64) / self.hidden_size
            angles = new / 10000.0**halves
            rows = torch.cat((angles.sin(), angles.cos()[:, : self.hidden_size // 2]), 1)
            self.rows = torch.cat((self.rows, rows.float()))
        return self.rows[positions]

    def extra_repr(self) -> str:
        return f"{self.hidden_size}"


def _distance_buckets(count: int, max_distance: int) -> Tensor:
    """Which of `count` buckets each of the distances 0 to max_distance is in."""
    distances, exact = torch.arange(max_distance + 1, device="cpu"), count // 2
    far = torch.log(distances.clamp(min=1).float() / exact) / math.log(max_distance / exact)  # in float32, as T5 has it
    return torch.where(distances < exact, distances, (exact + (far * (count - exact)).long()).clamp(max=count - 1))


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
