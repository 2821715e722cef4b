from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from pyllm import ops


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW on `pyllm.ops.adamw`: all tensors in one pass, and the clipping of gradients with them.

    Its state is torch's own, so that either goes on from the other's checkpoints; moments that it makes itself are
    float32, whatever the parameters are.

    Raises:
        ValueError: a setting out of its bounds, or a group of parameters, restored from elsewhere, with amsgrad,
            maximize, capturable or differentiable.
    """

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2):  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, scale: float | Tensor = 1.0) -> Any:
        """One step. Gradients count times `scale`, a number or a tensor of one element, and stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for key in ("amsgrad", "maximize", "capturable", "differentiable"):
                if group.get(key):
                    raise ValueError(f"[AdamW] {key} must be false, but got {group[key]!r}")
            self._update(group, scale)
        return loss

    def _update(self, group: dict[str, Any], scale: float | Tensor) -> None:
        alike: dict[tuple, list[tuple[Tensor, dict[str, Tensor]]]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = torch.zeros(p.shape, dtype=torch.float32, device=p.device)
            kind = (int(state["step"]), p.dtype, state["exp_avg"].dtype, p.device)
            alike.setdefault(kind, []).append((p, state))
        for (done, *_), members in alike.items():
            states = [state for _, state in members]
            ops.adamw(
                [p for p, _ in members], [_dense(p) for p, _ in members],
                [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], done + 1,
                lr=float(group["lr"]), beta1=float(group["betas"][0]), beta2=float(group["betas"][1]),
                eps=float(group["eps"]), weight_decay=float(group["weight_decay"]), scale=scale,
            )  # fmt: skip
            torch._foreach_add_([s["step"] for s in states], 1)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """That of all gradients together, float32, where they are."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).float()


def clip_scale(norm: Tensor, most: float) -> Tensor:
    """What brings a norm down to `most`; 1 if it is no larger."""
    return (most / (norm + 1e-6)).clamp(max=1.0)


def _dense(parameter: Tensor) -> Tensor:
    gradient = cast(Tensor, parameter.grad)
    if gradient.layout is not torch.strided:
        raise TypeError(f"[AdamW] gradients must be dense, but got one of layout {gradient.layout}")
    return gradient.contiguous()
