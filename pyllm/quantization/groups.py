"""Scales, and minimums, of groups of a weight: how elements are rounded by them, and which are the best."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_TRIED = torch.linspace(0.75, 1.1, 15)  # of the scale that would just hold a group's largest element
_ALL = slice(None)


class Groups:
    """Scales, and minimums or none, of the groups of some columns of a weight: how these are rounded."""

    def __init__(self, scales: Tensor, minimums: Tensor | None, bits: int):
        self.scales, self.minimums, self.bits = scales, minimums, bits  # (N, G)

    def round(self, weight: Tensor, group: int | slice = _ALL) -> Tensor:
        """The whole numbers that stand for elements of a group (N, n), or of groups (N, g, n)."""
        scale, minimum = self._of(group, weight)
        return ((weight - minimum) / torch.where(scale == 0, 1.0, scale)).round().clamp(0, 2**self.bits - 1)

    def value(self, whole: Tensor, group: int | slice = _ALL) -> Tensor:
        scale, minimum = self._of(group, whole)
        return whole * scale + minimum

    def half(self) -> Groups:
        """What float16 holds of them."""
        minimums = None if self.minimums is None else self.minimums.half().float()
        return Groups(self.scales.half().float(), minimums, self.bits)

    def _of(self, group: int | slice, like: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.scales[:, group].reshape(*like.shape[:-1], 1)
        if self.minimums is None:
            return scale, scale * -(2 ** (self.bits - 1))
        return scale, self.minimums[:, group].reshape(*like.shape[:-1], 1)


def extremes(weight: Tensor, bits: int, minimums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of each group of a weight (..., n), the smallest and the largest element, and the scale that just holds them."""
    low, high = weight.amin(-1), weight.amax(-1)
    if minimums:
        return low, high, (high - low) / (2**bits - 1)
    # The side with the largest element gets the end that reaches further.
    return low, high, torch.where(-low >= high, low, high) / -(2 ** (bits - 1))


def best_of(candidates: Iterable[Groups], weight: Tensor, weigh: Tensor) -> tuple[Groups, Tensor]:
    """For each group of a weight (N, G, n), of some candidates the one with the least squared error, and that."""
    best: Groups | None = None
    least = weight.new_empty(0)
    for groups in candidates:
        error = ((groups.value(groups.round(weight)) - weight).square() * weigh).sum(-1)
        if best is None:
            best, least = groups, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        best.scales = torch.where(better, groups.scales, best.scales)
        if best.minimums is not None and groups.minimums is not None:
            best.minimums = torch.where(better, groups.minimums, best.minimums)
    assert best is not None
    return best, least


def choose_groups(weight: Tensor, bits: int, minimums: bool, importance: Tensor | None = None) -> Groups:
    """For each group of a weight (N, G, group), of the scales near the one that holds its largest element, each fitted
    by least squares to the whole numbers that it leads to, the one with the least squared error.

    importance: (G, group), how much the error of each input counts.
    """
    weigh = weight.new_ones(weight.shape[1:]) if importance is None else importance
    low, _, base = extremes(weight, bits, minimums)
    tried = (Groups(base * factor, low * factor if minimums else None, bits).half() for factor in _TRIED)
    return best_of((_fitted(weight, groups, weigh) for groups in tried), weight, weigh)[0]


def _fitted(weight: Tensor, groups: Groups, weigh: Tensor) -> Groups:
    """Scales, and minimums, by weighted least squares for the whole numbers that these give."""
    whole = groups.round(weight)
    if groups.minimums is None:
        whole = whole - 2 ** (groups.bits - 1)
        square = (whole.square() * weigh).sum(-1)
        scale = (whole * weight * weigh).sum(-1) / square.clamp_min(1e-30)
        return Groups(torch.where(square > 0, scale, groups.scales), None, groups.bits).half()
    total = weigh.sum(-1)
    mean_q, mean_w = ((t * weigh).sum(-1, keepdim=True) / total[..., None] for t in (whole, weight))
    spread = ((whole - mean_q).square() * weigh).sum(-1)
    scale = ((whole - mean_q) * (weight - mean_w) * weigh).sum(-1) / spread.clamp_min(1e-30)
    scale = torch.where(spread > 0, scale, groups.scales)
    return Groups(scale, mean_w[..., 0] - scale * mean_q[..., 0], groups.bits).half()
