from __future__ import annotations

import torch
from torch import Tensor

from pyllm import ops
from pyllm.nn.linear import Linear

GATED = {"swiglu": ops.swiglu, "geglu": ops.geglu}
PLAIN = {"gelu": ops.gelu, "silu": ops.silu}


class FeedForward(torch.nn.Module):
    """down(activation(up(x))), or, for the gated "swiglu" and "geglu", down(activation(gate(x)) * up(x)).

    The gate and up products are one (Shazeer, 2020, https://arxiv.org/abs/2002.05202).
    """

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "swiglu", *, bias: bool = False):
        super().__init__()
        if activation not in GATED and activation not in PLAIN:
            raise ValueError(f"activation must be one of {', '.join([*GATED, *PLAIN])}, but got {activation!r}")
        self.activation = activation
        self.up = Linear(hidden_size, intermediate_size * (2 if activation in GATED else 1), bias=bias)
        self.down = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(
            GATED[self.activation](*h.chunk(2, -1)) if self.activation in GATED else PLAIN[self.activation](h)
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
