"""Positions: the frequencies that rotary ones turn by, also scaled for long texts, the slopes of linear biases, biases
by distance, and sines."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyllm import ops
from pyllm.nn.embedding import Embedding

SCALINGS = ("linear", "dynamic", "llama3", "yarn", "longrope")
BOUND = ("dynamic", "longrope")  # beyond a length these turn all positions of a text in another way


def rope_frequencies(theta: float, rotary_dim: int, scaling: dict[str, Any] | None) -> tuple[Tensor, float]:
    """(frequencies (rotary_dim / 2,), factor for what is turned), for `ops.rope`.

    They are computed in float32, step by step as in the programs that models were trained with: at position 100,000
    what float32 rounds off a frequency turns by up to 0.006.

    Args:
        theta: the base of the frequencies.
        scaling: None, or rope_type and its settings, under the names that Hugging Face configs give them. "linear"
            slows all frequencies by `factor`. "llama3" does so for wavelengths that the first training's length
            (`original_max_position_embeddings`) holds fewer than `low_freq_factor` times, with a smooth passage up to
            `high_freq_factor`. "yarn" (Peng et al., 2023, https://arxiv.org/abs/2309.00071) passes linearly between
            the dimensions that turn `beta_slow` and `beta_fast` times, and sharpens attention. "dynamic" is the
            unscaled form up to the model's context. "longrope" (Ding et al., 2024, https://arxiv.org/abs/2402.13753)
            slows each frequency by its own `short_factor`, up to the first training's length; or, with `long` set,
            as `pyllm.load(..., long=True)` does, by its `long_factor` at any length. Beyond those lengths both would
            turn a text's first tokens in another way because of those that follow: models refuse to go there.

    Raises:
        ValueError: a theta that is not above 0, a scaling that is not one of these, or a setting that it lacks.
    """
    if not 0 < theta < math.inf:
        raise ValueError(f"rope_theta must be a number above 0, but got {theta}")
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim
    wavelengths = theta**exponents
    if scaling is None:
        return 1 / wavelengths, 1.0
    kind = scaling.get("rope_type")
    if kind not in SCALINGS:
        raise ValueError(f"rope_scaling's rope_type must be one of {', '.join(SCALINGS)}, but got {kind!r}")
    if kind == "dynamic":
        return 1 / wavelengths, 1.0
    factor, scale = _setting(scaling, "factor"), 1.0
    if kind == "linear":
        return 1 / wavelengths / factor, scale
    original = _setting(scaling, "original_max_position_embeddings")
    if kind == "llama3":
        frequencies = _llama3(1 / wavelengths, scaling, factor, original)
    elif kind == "longrope":
        frequencies, scale = _longrope(wavelengths, scaling), _longrope_scale(scaling, factor, original)
    else:
        frequencies, scale = _yarn(theta, wavelengths, scaling, factor, original), _yarn_scale(scaling, factor)
    return frequencies, scale


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

    The queries' positions, (T,) or (B, T) -> (1 or B, num_heads, T, keys), for keys at 0 to keys - 1, by default
    up to the last query's position.
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

    def forward(self, positions: Tensor, keys: int | None = None) -> Tensor:
        positions = positions.view(-1, positions.shape[-1])
        if keys is None:
            keys = int(positions.max()) + 1
        distances = torch.arange(keys, device=positions.device) - positions[..., None]  # (1 or B, T, keys)
        self.buckets = self.buckets.to(positions.device)  # once: a CUDA graph cannot hold it
        of_distance = super().forward(self.buckets)  # (2 max_distance + 1, heads)
        clamped = distances.clamp(-self.max_distance, self.max_distance) + self.max_distance
        return ops.embedding(clamped, of_distance).permute(0, 3, 1, 2).contiguous()


class SinusoidalEmbedding(torch.nn.Module):
    """Positions (...), below num_positions, -> (..., hidden_size): sines, then cosines, of ever lower frequencies
    (Vaswani et al., 2017, https://arxiv.org/abs/1706.03762). Nothing is learned."""

    def __init__(self, num_positions: int, hidden_size: int):
        super().__init__()
        places = torch.arange(num_positions, dtype=torch.float64, device="cpu")[:, None]
        halves = torch.arange(0, hidden_size, 2, dtype=torch.float64, device="cpu") / hidden_size
        angles = places / 10000.0**halves
        self.rows = torch.cat((angles.sin(), angles.cos()[:, : hidden_size // 2]), 1).float()

    def forward(self, positions: Tensor) -> Tensor:
        self.rows = self.rows.to(positions.device)  # no buffer, which conversions of the model would round
        return ops.embedding(positions, self.rows)

    def extra_repr(self) -> str:
        return f"{self.rows.shape[0]}, {self.rows.shape[1]}"


def _distance_buckets(count: int, max_distance: int) -> Tensor:
    """Which of `count` buckets each of the distances 0 to max_distance is in."""
    distances, exact = torch.arange(max_distance + 1, device="cpu"), count // 2
    far = torch.log(distances.clamp(min=1).float() / exact) / math.log(max_distance / exact)  # in float32, as T5 has it
    return torch.where(distances < exact, distances, (exact + (far * (count - exact)).long()).clamp(max=count - 1))


def _llama3(frequencies: Tensor, scaling: dict[str, Any], factor: float, original: float) -> Tensor:
    low, high = _setting(scaling, "low_freq_factor"), _setting(scaling, "high_freq_factor")
    turns = original / (2 * math.pi / frequencies)
    kept = (turns - low) / (high - low)
    passage = (1 - kept) * frequencies / factor + kept * frequencies
    return torch.where(turns < low, frequencies / factor, torch.where(turns > high, frequencies, passage))


def _yarn(theta: float, wavelengths: Tensor, scaling: dict[str, Any], factor: float, original: float) -> Tensor:
    fast, slow = _setting(scaling, "beta_fast", 32.0), _setting(scaling, "beta_slow", 1.0)
    dim = 2 * len(wavelengths)
    first, last = (dim * math.log(original / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in (fast, slow))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    steps = torch.arange(len(wavelengths), dtype=torch.float32, device="cpu")
    kept = 1 - ((steps - first) / ((last - first) or 0.001)).clamp(0, 1)
    return 1 / (factor * wavelengths) * (1 - kept) + 1 / wavelengths * kept


def _longrope(wavelengths: Tensor, scaling: dict[str, Any]) -> Tensor:
    name = "long_factor" if scaling.get("long") else "short_factor"
    factors = scaling.get(name)
    if not isinstance(factors, list) or len(factors) != len(wavelengths):
        raise ValueError(f"rope_scaling's {name} must be a list of {len(wavelengths)} numbers, but got {factors!r}")
    factors = [_setting({name: factor}, name) for factor in factors]
    return 1 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * wavelengths)


def _longrope_scale(scaling: dict[str, Any], factor: float, original: float) -> float:
    if scaling.get("attention_factor") is not None:
        return _setting(scaling, "attention_factor")
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


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
