from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyllm import ops
from pyllm.nn.linear import Linear
from pyllm.nn.position import alibi_slopes, rope_frequencies
from pyllm.nn.state import PAGE_SIZE, KeyValueCache
from pyllm.ops.paging import new_pages


class Attention(torch.nn.Module):
    """Self-attention with grouped key/value heads (https://arxiv.org/abs/2305.13245), on (B, T, hidden).

    Query, key and value are one product. With `rope_theta`, queries and keys are turned by their positions
    (https://arxiv.org/abs/2104.09864), after `head_norm` (a norm of a head's size) where that is given; `rotary_dim`
    and `rope_scaling` are those of `ops.rope` and `rope_frequencies`, `scale` and `softcap` those of `ops.attention`.
    With `alibi`, scores rise with the key's position instead (https://arxiv.org/abs/2108.12409).
    With a cache, keys and values are written at `positions` (B, T), and attention is over all of the sequence so far,
    which then has `lengths` (B,) keys: both come from `AttentionState.positions`.
    Unless `causal`, each position sees the whole sequence, of which `lengths` (B,) says how much is no padding.
    A `bias` is added to the scores, as in `ops.attention`. With `dropout`, weights are left out while training
    without a cache: they are then held, (B, heads, T, T) of them.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int | None = None,
                 head_dim: int | None = None, *, rope_theta: float | None = None, rotary_dim: int | None = None,
                 rope_scaling: dict[str, Any] | None = None, alibi: bool = False, causal: bool = True,
                 window: int | None = None, scale: float | None = None, softcap: float | None = None,
                 head_norm: Callable[[int], torch.nn.Module] | None = None, qkv_bias: bool = False,
                 bias: bool = False, dropout: float = 0.0):  # fmt: skip
        super().__init__()
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads, but got {hidden_size} and {num_heads}")
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, but got {num_heads} and {num_kv_heads}")
        if alibi and not causal:
            raise ValueError("alibi must be with causal=True: its biases are by distance to what came before")
        self.head_dim = head_dim or hidden_size // num_heads
        self.rope_theta, self.window, self.scale, self.softcap = rope_theta, window, scale, softcap
        self.causal, self.dropout = causal, dropout
        self.rotary_dim = rotary_dim or self.head_dim
        self.slopes = alibi_slopes(num_heads) if alibi else None
        self.inv_freq, self.rope_scale = None, 1.0
        if rope_theta is not None:
            self.inv_freq, self.rope_scale = rope_frequencies(rope_theta, self.rotary_dim, rope_scaling)
        self.qkv = Linear(hidden_size, (num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=qkv_bias)
        self.qkv.parts = tuple(n * self.head_dim for n in (num_heads, self.num_kv_heads, self.num_kv_heads))
        self.out = Linear(num_heads * self.head_dim, hidden_size, bias=bias)
        self.q_norm = None if head_norm is None else head_norm(self.head_dim)
        self.k_norm = None if head_norm is None else head_norm(self.head_dim)

    def forward(self, x: Tensor, positions: Tensor | None = None, cache: KeyValueCache | None = None,
                lengths: Tensor | None = None, bias: Tensor | None = None) -> Tensor:  # fmt: skip
        if positions is None and (self.rope_theta is not None or cache is not None):
            raise TypeError("Attention with rope_theta or a cache needs positions")
        if cache is not None and lengths is None:
            raise TypeError("Attention with a cache needs lengths")
        batch, time, _ = x.shape
        heads = self.qkv(x).view(batch, time, -1, self.head_dim)  # (B, T, H + 2 Hkv, D)
        count = (self.num_heads, self.num_kv_heads)
        qk, v = heads.split((sum(count), self.num_kv_heads), 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split(count, 2)
            q, k = self._turned(self.q_norm(q), positions), self._turned(self.k_norm(k), positions)
        else:
            q, k = self._turned(qk, positions).split(count, 2)
        keys, page_table = time, None
        if cache is not None and positions is not None:
            cache.write(positions, k, v)
            k, v, page_table = cache.keys, cache.values, cache.page_table
            keys = cache.capacity
        if self.slopes is not None:  # by the key alone: what is the same for all keys of a query does not matter
            self.slopes = self.slopes.to(x.device)  # no buffer, which conversions of the model would round
            bias = self.slopes[:, None, None] * torch.arange(keys, dtype=torch.float32, device=x.device)
        dropout = self.dropout if self.training and cache is None else 0.0
        y = _attention(q, k, v, dropout, causal=self.causal, window=self.window, scale=self.scale, bias=bias,
                       softcap=self.softcap, key_lengths=lengths, page_table=page_table)  # fmt: skip
        return self.out(y.flatten(2))

    def _turned(self, x: Tensor, positions: Tensor | None) -> Tensor:
        if self.rope_theta is None or positions is None:
            return x
        if self.inv_freq is not None and self.inv_freq.device != x.device:
            self.inv_freq = self.inv_freq.to(x.device)
        return ops.rope(x, positions, rotary_dim=self.rotary_dim, inv_freq=self.inv_freq, scale=self.rope_scale)

    def new_cache(self, page_table: Tensor, num_pages: int, dtype: torch.dtype) -> KeyValueCache:
        keys, values = (new_pages(num_pages, PAGE_SIZE, self.num_kv_heads, self.head_dim, dtype=dtype,
                                  device=page_table.device) for _ in range(2))  # fmt: skip
        return KeyValueCache(keys, values, page_table)

    def extra_repr(self) -> str:
        return (f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
                f"rope_theta={self.rope_theta}, causal={self.causal}, window={self.window}")  # fmt: skip


class CrossAttention(torch.nn.Module):
    """Attention from (B, T, hidden) to a source (B, S, hidden), of which the first `lengths` (B,) count.

    Keys and values are one product, which `keys_and_values` makes once for all that attends to them; they may lie in
    pages, as in `ops.attention`. `dropout` is as in `Attention`.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int | None = None, *, scale: float | None = None,
                 bias: bool = False, dropout: float = 0.0):  # fmt: skip
        super().__init__()
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads, but got {hidden_size} and {num_heads}")
        self.num_heads, self.head_dim, self.scale = num_heads, head_dim or hidden_size // num_heads, scale
        self.dropout, size = dropout, num_heads * self.head_dim
        self.query = Linear(hidden_size, size, bias=bias)
        self.kv = Linear(hidden_size, 2 * size, bias=bias)
        self.out = Linear(size, hidden_size, bias=bias)

    def keys_and_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, heads, head size) each, of a source (B, S, hidden)."""
        k, v = self.kv(source).view(*source.shape[:2], 2, self.num_heads, self.head_dim).unbind(2)
        return k, v

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None = None,
                page_table: Tensor | None = None) -> Tensor:  # fmt: skip
        q = self.query(x).view(*x.shape[:2], self.num_heads, self.head_dim)
        dropout = self.dropout if self.training else 0.0
        y = _attention(q, keys, values, dropout, scale=self.scale, key_lengths=lengths, page_table=page_table)
        return self.out(y.flatten(2))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"


def _attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, **options: Any) -> Tensor:
    if dropout == 0:
        return ops.attention(q, k, v, **options)
    _, weights = ops.attention(q, k, v, **options, return_weights=True)  # (B, H, Tq, Tk)
    kept = torch.nn.functional.dropout(weights, dropout)
    values = v.repeat_interleave(q.shape[2] // v.shape[2], 2)  # (B, Tk, H, Dv)
    return (kept @ values.transpose(1, 2)).transpose(1, 2)
