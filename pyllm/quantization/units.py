"""Scales, and minimums, of 4 bits in groups of more than 32: whole multiples of a unit that the pieces of a group have
together, so that an element is a byte times the unit (see `pyllm.ops.QuantizedWeight`)."""

from __future__ import annotations

import torch
from torch import Tensor

from pyllm.quantization.groups import Groups, best_of, extremes

_BITS, _TOP = 4, 15  # the largest whole number that is multiplied with a scale
_REACH = 127  # of an element, in units
_LEAST = 2.0**-24  # whose multiples float16 holds
_TRIED = range(-4, 2)  # added to the multiple that would just hold a piece's largest element


def choose_units(weight: Tensor, minimums: bool, importance: Tensor | None = None) -> Tensor:
    """For each group of a weight (N, G, pieces, 32), of the unit that its largest element asks for and half of it, the
    one with the least squared error: (N, G).

    importance: (G, pieces, 32), how much the error of each input counts.
    """
    _, exponent = weight.abs().amax((-1, -2)).frexp()  # one more than that of the largest power of two
    usual = torch.ldexp(torch.ones_like(weight[..., 0, 0]), exponent - 7).clamp_min(_LEAST)
    half = (usual / 2).clamp_min(_LEAST)
    errors = [_search(weight, units, minimums, importance)[1].sum(-1) for units in (usual, half)]
    return torch.where(errors[1] < errors[0], half, usual)


def choose_multiples(weight: Tensor, units: Tensor, minimums: bool, importance: Tensor | None = None) -> Groups:
    """For each piece of a weight (N, G, pieces, 32), of the multiples of its group's unit (N, G) near the one that just
    holds its largest element, the one with the least squared error: `Groups` (N, G * pieces)."""
    return _search(weight, units, minimums, importance)[0]


def _search(weight: Tensor, units: Tensor, minimums: bool, importance: Tensor | None) -> tuple[Groups, Tensor]:
    """And the errors (N, G, pieces)."""
    weigh = (torch.ones_like(weight[0]) if importance is None else importance).flatten(0, 1)
    unit = units[..., None].expand(weight.shape[:-1]).flatten(1)
    x = weight.flatten(1, 2) / unit[..., None]
    low, high, base = extremes(x, _BITS, minimums)
    most = 2 * _REACH // _TOP if minimums else _REACH // 2 ** (_BITS - 1)

    def tried(more: int) -> Groups:
        multiple = base.sign() * (base.abs().round() + more).clamp(1, most)
        if not minimums:
            return Groups(multiple, None, _BITS)

        def bounded(minimum: Tensor) -> Tensor:
            return torch.minimum(minimum.round(), _REACH - _TOP * multiple).clamp_min(-_REACH)

        groups = Groups(multiple, bounded((low + high - _TOP * multiple) / 2), _BITS)
        rest = x - groups.round(x) * multiple[..., None]
        return Groups(multiple, bounded((rest * weigh).sum(-1) / weigh.sum(-1)), _BITS)

    best, error = best_of(map(tried, _TRIED), x, weigh)
    minimum = None if best.minimums is None else best.minimums * unit
    return Groups(best.scales * unit, minimum, _BITS), (error * unit.square()).view(weight.shape[:-1])
