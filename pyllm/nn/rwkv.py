"""The two layers of RWKV-7 "Goose" (Peng et al., 2025, https://arxiv.org/abs/2503.14456)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyllm import ops
from pyllm.nn.feed_forward import FeedForward
from pyllm.nn.linear import Linear


def shift_tokens(x: Tensor, last: Tensor | None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (B, T, hidden) one step later, after `last` (B, hidden) or zeros; and what comes last, at each length."""
    first = x.new_zeros(x.shape[0], 1, x.shape[2]) if last is None else last[:, None]
    joined = torch.cat((first, x), 1)
    ends = joined[:, -1] if lengths is None else joined[torch.arange(len(x), device=x.device), lengths]
    return joined[:, :-1], ends


class LowRank(torch.nn.Module):
    """up(activation(down(x))), through `rank` dimensions."""

    def __init__(self, hidden_size: int, rank: int, activation: str | None = None, *, bias: bool = True):
        super().__init__()
        self.activation = activation
        self.down = Linear(hidden_size, rank, bias=False)
        self.up = Linear(rank, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(x)
        return self.up(h if self.activation is None else {"tanh": ops.tanh, "sigmoid": ops.sigmoid}[self.activation](h))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class HeadNorm(torch.nn.Module):
    """Layer norm of each head (..., H, D), with weights of its own: torch.nn.GroupNorm's, (H * D,) each."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        heads = x.shape[-2:]
        return ops.layer_norm(x, eps=self.eps) * self.weight.view(heads) + self.bias.view(heads)


class TimeMix(torch.nn.Module):
    """The layer that looks back, by `ops.wkv`, in heads of `head_dim`.

    Each of its inputs is a mixture, by `mix`, of a token and the one before it, in the order of receptance, decay, key,
    value, rate of learning and gate. `value_rank` of None makes a model's first layer: its values are what the others
    mix theirs with. `removal`, `replacement` and `bonus` are the paper's xi, alpha and rho.
    """

    def __init__(self, hidden_size: int, head_dim: int, *, decay_rank: int, rate_rank: int, value_rank: int | None,
                 gate_rank: int, norm_eps: float = 1e-5):  # fmt: skip
        super().__init__()
        if hidden_size % head_dim:
            raise ValueError(f"hidden_size must be a multiple of head_dim, but got {hidden_size} and {head_dim}")
        self.head_dim = head_dim
        self.mix = torch.nn.Parameter(torch.full((6, 1, hidden_size), 0.5))
        self.receptance, self.key, self.value, self.out = (Linear(hidden_size, hidden_size, bias=False)
                                                           for _ in range(4))  # fmt: skip
        self.decay = LowRank(hidden_size, decay_rank, "tanh")
        self.rate = LowRank(hidden_size, rate_rank)
        self.value_mix = None if value_rank is None else LowRank(hidden_size, value_rank)
        self.gate = LowRank(hidden_size, gate_rank, "sigmoid", bias=False)
        self.removal = torch.nn.Parameter(torch.ones(hidden_size))
        self.replacement = torch.nn.Parameter(torch.ones(hidden_size))
        self.bonus = torch.nn.Parameter(torch.zeros(hidden_size // head_dim, head_dim))
        self.norm = HeadNorm(hidden_size, head_dim * norm_eps)

    def forward(
        self,
        x: Tensor,
        first_value: Tensor | None = None,
        last: Tensor | None = None,
        state: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x: (B, T, hidden); first_value: the second of what the model's first layer returned; last (B, hidden) and
        state (B, H, D, D): the last two of what this layer returned for the tokens before."""
        before, last = shift_tokens(x, last, lengths)
        xr, xw, xk, xv, xa, xg = x + (before - x) * self.mix[:, None]  # (6, B, T, hidden)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        w = ops.sigmoid(self.decay(xw)) * -math.exp(-0.5)
        if self.value_mix is None:
            first_value = v
        elif first_value is None:
            raise TypeError("TimeMix with a value_rank needs the first layer's values")
        else:
            v = v + (first_value - v) * ops.sigmoid(self.value_mix(xv))
        rate, gate = ops.sigmoid(self.rate(xa)), self.gate(xg)
        removal = k * self.removal
        k = k * (1 + (rate - 1) * self.replacement)
        r, w, k, v, rate, removal = (t.unflatten(-1, (-1, self.head_dim)) for t in (r, w, k, v, rate, removal))
        removal = ops.rms_norm(removal, eps=1e-24 / self.head_dim) * self.head_dim**-0.5  # to length 1
        y, state = ops.wkv(r, w, k, v, -removal, removal * rate, state, lengths=lengths)
        y = self.norm(y) + ops.linear(r * k * self.bonus, r.new_ones(1, self.head_dim)) * v
        return self.out(y.flatten(2) * gate), first_value, last, state

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}"


class ChannelMix(torch.nn.Module):
    """A feed-forward layer with a squared relu, on a mixture of each token and the one before it."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.mix = torch.nn.Parameter(torch.full((hidden_size,), 0.5))
        self.feed_forward = FeedForward(hidden_size, intermediate_size, "relu_squared")

    def forward(self, x: Tensor, last: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x: (B, T, hidden); last (B, hidden): the second of what this returned for the tokens before."""
        before, last = shift_tokens(x, last, lengths)
        return self.feed_forward(x + (before - x) * self.mix), last
