from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable as _checked


class Function(torch.autograd.Function):
    """torch's, of which a call goes straight to the compiled part. What torch does before takes two microseconds and is
    for `torch.func`, whose transforms refuse these functions."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of that name, which only a backward pass that records a graph (`create_graph`) goes through:
    elsewhere what it does, several microseconds a call, has no effect."""
    checked = _checked(backward)

    def step(ctx: Any, *gradients: Any) -> Any:
        return (checked if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return step
