from __future__ import annotations

import torch
from torch import Tensor

from pyllm import ops
from pyllm.nn.linear import Linear
from pyllm.nn.state import KeyValueCache


class Attention(torch.nn.Module):
    """Causal self-attention with grouped key/value heads (https://arxiv.org/abs/2305.13245), on (B, T, hidden).

    Query, key and value are one product. With `rope_theta`, queries and keys are turned by their positions
    (https://arxiv.org/abs/2104.09864). With a cache, keys and values are written at `positions` (B, T) and attention is
    over all of the sequence so far.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int | None = None,
                 head_dim: int | None = None, *, rope_theta: float | None = None, window: int | None = None,
                 qkv_bias: bool = False, bias: bool = False):  # fmt: skip
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads, but got {hidden_size} and {num_heads}")
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, but got {num_heads} and {num_kv_heads}")
        self.head_dim = head_dim or hidden_size // num_heads
        self.rope_theta, self.window = rope_theta, window
        self.qkv = Linear(hidden_size, (num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=qkv_bias)
        self.out = Linear(num_heads * self.head_dim, hidden_size, bias=bias)

    def forward(self, x: Tensor, positions: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        batch, time, _ = x.shape
        heads = self.qkv(x).view(batch, time, -1, self.head_dim)  # (B, T, H + 2 Hkv, D)
        rotated = self.num_heads + self.num_kv_heads
        if self.rope_theta is not None:
            turned = ops.rope(heads[:, :, :rotated], positions, theta=self.rope_theta)
            q, k = turned.split((self.num_heads, self.num_kv_heads), 2)
        else:
            q, k = heads[:, :, :rotated].split((self.num_heads, self.num_kv_heads), 2)
        v = heads[:, :, rotated:]
        if cache is None:
            y = ops.attention(q, k, v, causal=True, window=self.window)
        else:
            cache.write(positions, k, v)
            lengths = positions[:, -1] + 1
            longest = int(lengths.max())
            y = ops.attention(q, cache.keys[:, :longest], cache.values[:, :longest], causal=True, window=self.window,
                              key_lengths=lengths)  # fmt: skip
        return self.out(y.flatten(2))

    def extra_repr(self) -> str:
        return (f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
                f"rope_theta={self.rope_theta}, window={self.window}")  # fmt: skip
