from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def adamw(parameters: Sequence[Tensor], gradients: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor],
          step: int, *, lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
          weight_decay: float = 0.01, scale: float | Tensor = 1.0) -> None:  # fmt: skip
    for p, gradient, m, v in zip(parameters, gradients, first, second, strict=True):
        wide = torch.promote_types(p.dtype, torch.float32)
        g = gradient.to(wide) * (scale.reshape(()) if isinstance(scale, Tensor) else scale)
        mean, square = m.to(wide), v.to(wide)
        mean = mean + (1 - beta1) * (g - mean)
        square = beta2 * square + (1 - beta2) * g * g
        root = (square / (1 - beta2**step)).sqrt() + eps
        p.copy_((1 - lr * weight_decay) * p.to(wide) - lr * (mean / (1 - beta1**step)) / root)
        m.copy_(mean)
        v.copy_(square)
