"""A weight as whole numbers of 8 or 4 bits, in groups along its input that share a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from pyllm.ops import QuantizedWeight
from pyllm.ops.quantized_linear import PIECE

_ROWS = 1 << 22  # elements searched at once
_TRIED = torch.linspace(0.75, 1.1, 15)  # of the scale that would just hold a group's largest element


class Groups:
    """Scales, and minimums or none, of the groups of some columns of a weight: how these are rounded."""

    def __init__(self, scales: Tensor, minimums: Tensor | None, bits: int):
        self.scales, self.minimums, self.bits = scales, minimums, bits  # (N, G) of float32 that float16 can hold

    def round(self, weight: Tensor, group: int | slice) -> Tensor:
        """The whole numbers that stand for elements of a group (N, n), or of groups (N, g, n)."""
        scale, minimum = self._of(group, weight)
        return ((weight - minimum) / torch.where(scale == 0, 1.0, scale)).round().clamp(0, 2**self.bits - 1)

    def value(self, whole: Tensor, group: int | slice) -> Tensor:
        scale, minimum = self._of(group, whole)
        return whole * scale + minimum

    def _of(self, group: int | slice, like: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scales[:, group].reshape(*like.shape[:-1], 1)
        if self.minimums is None:
            return scale, scale * -(2 ** (self.bits - 1))
        return scale, self.minimums[:, group].reshape(*like.shape[:-1], 1)


def choose_groups(weight: Tensor, bits: int, minimums: bool, importance: Tensor | None = None) -> Groups:
    """For each group of a weight (N, G, group), of the scales near the one that holds its largest element, each fitted
    by least squares to the whole numbers that it leads to, the one with the least squared error.

    importance: (G, group), how much the error of each input counts.
    """
    weigh = weight.new_ones(weight.shape[1:]) if importance is None else importance
    top, half = 2**bits - 1, 2 ** (bits - 1)
    low, high = weight.amin(-1), weight.amax(-1)
    # Without minimums, the side with the largest element gets the end that reaches further.
    base = (high - low) / top if minimums else torch.where(-low >= high, low, high) / -half
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for factor in _TRIED:
        minimum = low * factor if minimums else None
        groups = _fitted(weight, _rounded(base * factor, minimum, bits), weigh)
        error = ((groups.value(groups.round(weight, slice(None)), slice(None)) - weight).square() * weigh).sum(-1)
        if best is None:
            best = error, groups.scales, torch.zeros(()) if groups.minimums is None else groups.minimums
        else:
            better = error < best[0]
            others = torch.zeros(()) if groups.minimums is None else torch.where(better, groups.minimums, best[2])
            best = torch.where(better, error, best[0]), torch.where(better, groups.scales, best[1]), others
    assert best is not None
    return Groups(best[1], best[2] if minimums else None, bits)


def _fitted(weight: Tensor, groups: Groups, weigh: Tensor) -> Groups:
    """Scales, and minimums, by weighted least squares for the whole numbers that these give."""
    whole = groups.round(weight, slice(None))
    if groups.minimums is None:
        whole = whole - 2 ** (groups.bits - 1)
        square = (whole.square() * weigh).sum(-1)
        return _rounded(torch.where(square > 0, (whole * weight * weigh).sum(-1) / square.clamp_min(1e-30),
                                    groups.scales), None, groups.bits)  # fmt: skip
    total = weigh.sum(-1)
    mean_q, mean_w = ((t * weigh).sum(-1, keepdim=True) / total[..., None] for t in (whole, weight))
    spread = ((whole - mean_q).square() * weigh).sum(-1)
    scale = ((whole - mean_q) * (weight - mean_w) * weigh).sum(-1) / spread.clamp_min(1e-30)
    scale = torch.where(spread > 0, scale, groups.scales)
    return _rounded(scale, mean_w[..., 0] - scale * mean_q[..., 0], groups.bits)


def _rounded(scales: Tensor, minimums: Tensor | None, bits: int) -> Groups:
    return Groups(scales.half().float(), None if minimums is None else minimums.half().float(), bits)


def quantize_weight(weight: Tensor, bits: int, *, minimums: bool = False, importance: Tensor | None = None,
                    group: int = 32) -> QuantizedWeight:  # fmt: skip
    """The nearest quantised weight, group by group.

    Args:
        weight: (N, K), floating-point.
        bits: 8 or 4.
        minimums: groups have a smallest element of their own besides a scale: more exact, and half a bit more.
        importance: (K,), how much the error of each input counts, such as its mean square.
        group: elements that share a scale: 32 or, of 8 bits without minimums, 64, 128 or 256.

    Raises:
        ValueError: a weight that is not finite, or beyond what a float16 scale can hold.
    """
    n, k = weight.shape
    filled = torch.cat((weight.detach(), weight.detach()[:, -1:].expand(n, -k % group)), 1)
    grouped = filled.unflatten(1, (-1, group))
    if importance is not None:
        importance = torch.nn.functional.pad(importance.float(), (0, -k % group)).unflatten(0, (-1, group))
        importance = importance + importance.mean() * 1e-3 + 1e-30  # an input that never came still counts a little
    wholes, scales, lows = [], [], []
    for rows in grouped.split(max(1, _ROWS // max(1, k))):
        rows = rows.float()
        if not rows.isfinite().all() or (rows.numel() and rows.abs().max() > 65504):
            raise ValueError("[quantize] weight must be finite, and at most 65504, to be quantised")
        groups = choose_groups(rows, bits, minimums, importance)
        wholes.append(groups.round(rows, slice(None)).to(torch.uint8))
        scales.append(groups.scales.half())
        lows += [] if groups.minimums is None else [groups.minimums.half()]
    whole = torch.cat(wholes) if wholes else grouped.to(torch.uint8)
    return pack_wholes(whole, torch.cat(scales), torch.cat(lows) if minimums else None, bits, (n, k))


def pack_wholes(whole: Tensor, scales: Tensor, minimums: Tensor | None, bits: int,
                shape: tuple[int, int]) -> QuantizedWeight:  # fmt: skip
    """A `QuantizedWeight` from its whole numbers, uint8 (N, G, group), and scales and minimums (N, G)."""
    group, values = whole.shape[2], whole.flatten(1)
    if bits == 4:
        values = values[:, ::2] | values[:, 1::2] << 4
    if group > PIECE:
        pieces = -(-shape[1] // PIECE)
        values, scales = values[:, : pieces * PIECE], scales.repeat_interleave(group // PIECE, 1)[:, :pieces]
    return QuantizedWeight(values.contiguous(), scales.contiguous(), minimums, bits, shape, group)
