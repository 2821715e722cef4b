from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routes(NamedTuple):
    weights: Tensor
    order: Tensor
    places: Tensor
    offsets: Tensor


def route(logits: Tensor, *, active: int, normalised: bool = True) -> Routes:
    likely = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    weights, chosen = (t[:, :active] for t in likely.sort(dim=-1, descending=True, stable=True))
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    pairs = chosen.flatten().argsort(stable=True)
    offsets = torch.stack([(chosen < e).sum() for e in range(logits.shape[1] + 1)])
    return Routes(weights, pairs // active, pairs.argsort(), offsets)
