from __future__ import annotations

import torch
from torch import Tensor

from pyllm.reference.linear import linear


def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100, label_smoothing: float = 0.0,
                  reduction: str = "mean") -> Tensor:  # fmt: skip
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    kept = targets != ignore_index
    right = log_p.gather(-1, targets.where(kept, 0)[..., None])[..., 0]
    losses = -(1 - label_smoothing) * right - label_smoothing * log_p.mean(-1)
    losses = losses.where(kept, 0)
    if reduction == "none":
        return losses
    return losses.sum() / kept.sum() if reduction == "mean" else losses.sum()


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, *,
                         ignore_index: int = -100, label_smoothing: float = 0.0,
                         reduction: str = "mean") -> Tensor:  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = linear(x.to(wide), weight, bias)
    return cross_entropy(logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing,
                         reduction=reduction)  # fmt: skip
