from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable as _checked


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of that name, which only a backward pass that records a graph (`create_graph`) goes through:
    elsewhere what it does, several microseconds a call, has no effect."""
    checked = _checked(backward)

    def step(ctx: Any, *gradients: Any) -> Any:
        return (checked if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return step
