from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyllm import _C


def adamw(parameters: Sequence[Tensor], gradients: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor],
          step: int, *, lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8,
          weight_decay: float = 0.01, scale: float | Tensor = 1.0) -> None:  # fmt: skip
    """One step of AdamW (Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101), in place, of all tensors in
    one pass over memory: with g a gradient times scale,

        first += (1 - beta1) * (g - first)
        second = beta2 * second + (1 - beta2) * g * g
        parameter = (1 - lr * weight_decay) * parameter
                    - lr * (first / (1 - beta1^step)) / (sqrt(second / (1 - beta2^step)) + eps)

    An element's result has the same bits for any number of threads, and whatever other tensors come with it.

    Args:
        parameters: float32, bfloat16 or float16, contiguous, all of one dtype on one device.
        gradients: of the parameters' shapes and dtype, contiguous.
        first, second: the moments, contiguous, of the parameters' shapes; all float32, or all of the parameters' dtype.
            The arithmetic is in float32.
        step: which step it is, from 1 on.
        scale: of the gradients, such as what clips their norm; a number, or a tensor of one element, float32, where the
            parameters are, which the host then need not wait for.

    Raises:
        ValueError, TypeError: a shape, dtype or setting that does not fit; nothing is changed then.
    """
    _C.adamw(parameters, gradients, first, second, step, lr, beta1, beta2, eps, weight_decay, scale)
    torch.autograd.graph.increment_version([*parameters, *first, *second])
