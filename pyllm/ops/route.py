from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from pyllm import _C
from pyllm.ops.gradients import Function, once_differentiable


class Routes(NamedTuple):
    """Which experts N rows go to, `active` each, and all these pairs in order of their experts.

    weights: (N, active) float32, how likely a row's experts are, the likeliest first.
    order: (N * active,) int64, the row of each pair; those of expert e begin at offsets[e], in order.
    places: (N * active,) int64, where a row's first, second, ... expert comes in that order, row after row.
    offsets: (E + 1,) int64, the last of which is N * active.
    """

    weights: Tensor
    order: Tensor
    places: Tensor
    offsets: Tensor


def route(logits: Tensor, *, active: int, normalised: bool = True) -> Routes:
    """The experts that rows go to: those with the largest of softmax(logits), of equals the first.

    A row's results do not depend on the others. Gradients come through the weights.

    Args:
        logits: (N, E), float32, bfloat16 or float16.
        active: how many experts a row goes to, 1 to E.
        normalised: a row's weights are made to sum to one.

    Raises:
        ValueError, TypeError: a shape, dtype or number that does not fit.
    """
    if logits.is_cuda:
        return Routes(*_on_cuda(logits, active, normalised))
    if torch.is_grad_enabled() and logits.requires_grad:
        return Routes(*_Route.apply(_rows(logits), active, normalised))
    return Routes(*_forward(_rows(logits), active, normalised))


def through_experts(experts: Iterable[Callable[[Tensor], Tensor]], x: Tensor, offsets: Tensor) -> Tensor:
    """Rows x (N, K) in order of their experts, `Routes.offsets`, each through its own: (N, K).

    In a recorded step every expert is there for as many rows as come to it then.
    """
    if not _C.recording():
        if offsets.is_cuda and torch.cuda.is_current_stream_capturing():  # said before the capture is spoilt
            raise RuntimeError("[through_experts] how many rows come to an expert must be read from the device")
        parts = [expert(x[a:b]) for expert, (a, b) in zip(experts, pairwise(offsets.tolist()), strict=True) if a < b]
        return torch.cat(parts) if parts else x
    out = torch.empty_like(x)
    for e, expert in enumerate(experts):
        _C.begin_rows(offsets, e, x, out)
        out.copy_(expert(x))
        _C.end_rows()
    return out


def _rows(logits: Tensor) -> Tensor:
    apart = not logits.is_contiguous() and logits.stride(-1) != 1
    return logits.clone(memory_format=torch.contiguous_format) if apart else logits


def _forward(logits: Tensor, active: int, normalised: bool) -> tuple[Tensor, ...]:
    rows, experts = logits.shape if logits.dim() == 2 else (0, 0)
    room = active if 1 <= active <= experts else 0
    order, places = (logits.new_empty(rows * room, dtype=torch.int64) for _ in range(2))
    weights = logits.new_empty(rows, room, dtype=torch.float32)
    offsets = logits.new_empty(experts + 1, dtype=torch.int64)
    _C.route(logits, weights, order, places, offsets, active, normalised)
    return weights, order, places, offsets


def _on_cuda(logits: Tensor, active: int, normalised: bool) -> tuple[Tensor, ...]:
    if logits.dim() != 2 or not 1 <= active <= logits.shape[1]:
        raise ValueError(f"[route] logits must be (N, E), and active from 1 to E, but got {tuple(logits.shape)} "
                         f"and {active}")  # fmt: skip
    weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(active, -1)
    by_expert = chosen.flatten().sort(stable=True)
    places = torch.empty_like(by_expert.indices)
    places[by_expert.indices] = torch.arange(len(places), device=places.device)
    ends = torch.arange(logits.shape[1] + 1, device=logits.device)
    offsets = torch.searchsorted(by_expert.values, ends)
    return _normalised(weights, normalised), by_expert.indices // active, places, offsets


def _normalised(weights: Tensor, normalised: bool) -> Tensor:
    return weights / weights.sum(-1, keepdim=True) if normalised else weights


class _Route(Function):
    @staticmethod
    def forward(ctx, logits, active, normalised):
        weights, order, places, offsets = _forward(logits, active, normalised)
        ctx.save_for_backward(logits, weights, places, offsets)
        ctx.normalised = normalised
        ctx.mark_non_differentiable(order, places, offsets)
        return weights, order, places, offsets

    @staticmethod
    @once_differentiable
    def backward(ctx, dweights, *_):
        logits, weights, places, offsets = ctx.saved_tensors
        dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        _C.route_backward(logits, weights, dweights.contiguous(), places, offsets, dlogits, ctx.normalised)
        return dlogits, None, None
