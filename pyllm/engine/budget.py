from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyllm.engine.pool import AttentionPool, RecurrentPool
from pyllm.engine.sources import SourcePool
from pyllm.models import Model
from pyllm.nn import AttentionState, RecurrentState, SourceState
from pyllm.nn.state import PAGE_SIZE
from pyllm.ops.paging import page_width


def new_pool(model: Model, max_sequences: int, num_pages: int | None, max_length: int | None, reuse: bool,
             kv_cache_dtype: str = "auto", kv_cache_memory_bytes: int | None = None) -> Any:  # fmt: skip
    """The pool for a model's kind of state.

    Raises:
        ValueError: a model without a limit to its context needs max_length or a number of pages or bytes; bytes that
            hold no page; a dtype of keys and values that is not known.
        TypeError: a state of another kind, or without keys and values where something is asked of them.
    """
    if kv_cache_dtype not in ("auto", "int8"):
        raise ValueError(f"kv_cache_dtype must be 'auto' or 'int8', but got {kv_cache_dtype!r}")
    if num_pages is not None and kv_cache_memory_bytes is not None:
        raise ValueError("num_pages and kv_cache_memory_bytes must not both be given")
    if model.answers:
        one = torch.ones(1, dtype=torch.int64, device=model.device)
        state = model.begin(one[None] - 1, one, 1)[0]
    else:
        state = model.new_state(1, 1)
    if isinstance(state, RecurrentState):
        if kv_cache_dtype != "auto" or kv_cache_memory_bytes is not None:
            raise TypeError("kv_cache_dtype and kv_cache_memory_bytes must be for a model with attention, but it has a "
                            "recurrent state")  # fmt: skip
        return RecurrentPool(state.vectors, max_sequences, reuse)
    if not isinstance(state, AttentionState):
        raise TypeError(f"an engine must get a model with an AttentionState or a RecurrentState, but got one with a "
                        f"{type(state).__name__}")  # fmt: skip
    longest = model.context_length if max_length is None else max_length
    dtype = torch.int8 if kv_cache_dtype == "int8" else None
    if kv_cache_memory_bytes is not None:
        size = sum(page_bytes(t, dtype or t.dtype) for c in state.caches for t in (c.keys, c.values))
        num_pages = kv_cache_memory_bytes // size - 1  # one is for what is padding
        if num_pages < 1:
            raise ValueError(f"kv_cache_memory_bytes must be at least {2 * size}, but got {kv_cache_memory_bytes}")
    if num_pages is None:
        if longest is None:
            raise ValueError("max_length or num_pages must be given, as the model's context has no limit")
        num_pages = max_sequences * pages_for(model, longest, longest if model.answers else 1)
    if isinstance(state, SourceState):
        return SourcePool(model, state, num_pages, longest or num_pages * PAGE_SIZE, dtype)
    return AttentionPool(model, state.caches, num_pages, model.context_length or num_pages * PAGE_SIZE, reuse, dtype)


def page_bytes(pages: Tensor, dtype: torch.dtype) -> int:
    """Those of one page of a layer's keys or values, of the shape of others, in a dtype."""
    return math.prod(pages.shape[1:3]) * page_width(pages.shape[3], dtype) * dtype.itemsize


def pages_for(model: Model, length: int, max_tokens: int) -> int:
    """How many pages a request with a prompt of so many ids, and so many more, needs. One that is too long for the
    model's context never runs, however long it is."""
    parts = (length, max_tokens) if model.answers else (length + max_tokens - 1,)
    most = max(parts) if model.context_length is None else model.context_length
    return sum(-(-min(n, most) // PAGE_SIZE) for n in parts)
