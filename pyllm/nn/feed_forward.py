from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pyllm import ops
from pyllm.nn.linear import Linear
from pyllm.ops.route import through_experts

GATED: dict[str, Callable[..., Tensor]] = {
    "swiglu": ops.swiglu, "geglu": ops.geglu, "geglu_tanh": partial(ops.geglu, approximate="tanh"),
}  # fmt: skip
PLAIN: dict[str, Callable[..., Tensor]] = {
    "gelu": ops.gelu, "gelu_tanh": partial(ops.gelu, approximate="tanh"), "relu": torch.relu,
    "relu_squared": ops.relu_squared, "silu": ops.silu,
}  # fmt: skip


def usual_size(hidden_size: int, activation: str) -> int:
    """The intermediate size that is usual: four times the hidden size, or with a gate what has as many parameters."""
    wide = 4 * hidden_size
    return (wide * 2 // 3 + 31) // 32 * 32 if activation in GATED else wide


class FeedForward(torch.nn.Module):
    """down(activation(up(x))), or, for the gated "swiglu" and "geglu", down(activation(gate(x)) * up(x)).

    The gate and up products are one (Shazeer, 2020, https://arxiv.org/abs/2002.05202). "gelu_tanh" and "geglu_tanh" use
    the approximation by tanh. `dropout` is of what down reads.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "swiglu", *, bias: bool = False,
                 dropout: float = 0.0):  # fmt: skip
        super().__init__()
        if activation not in GATED and activation not in PLAIN:
            raise ValueError(f"activation must be one of {', '.join([*GATED, *PLAIN])}, but got {activation!r}")
        self.activation = activation
        self.up = Linear(hidden_size, intermediate_size * (2 if activation in GATED else 1), bias=bias)
        self.down = Linear(intermediate_size, hidden_size, bias=bias)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h = GATED[self.activation](*h.chunk(2, -1)) if self.activation in GATED else PLAIN[self.activation](h)
        return self.down(self.dropout(h))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class Experts(torch.nn.Module):
    """A sparse mixture (Shazeer et al., 2017, https://arxiv.org/abs/1701.06538): each token goes through the `active`
    experts that the router gives the most weight, and their results are added by those weights; with `normalised`, made
    to sum to one."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "swiglu", *, num_experts: int,
                 active: int, normalised: bool = True, bias: bool = False):  # fmt: skip
        super().__init__()
        if not 1 <= active <= num_experts:
            raise ValueError(f"active must be from 1 to {num_experts}, the number of experts, but got {active}")
        self.active, self.normalised = active, normalised
        self.router = Linear(hidden_size, num_experts, bias=False)
        self.experts = torch.nn.ModuleList(
            FeedForward(hidden_size, intermediate_size, activation, bias=bias) for _ in range(num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (N, hidden)
        routes = ops.route(self.router(rows), active=self.active, normalised=self.normalised)
        sent = ops.embedding(routes.order, rows)  # (N * active, hidden), by experts
        sent = through_experts(self.experts, sent, routes.offsets)
        found = ops.embedding(routes.places, sent).view(*routes.weights.shape, -1)  # (N, active, hidden)
        weighted = [found[:, i] * w for i, w in enumerate(routes.weights.to(x.dtype)[..., None].unbind(1))]
        return functools.reduce(torch.add, weighted).view(x.shape)

    def extra_repr(self) -> str:
        return f"active={self.active}, normalised={self.normalised}"
