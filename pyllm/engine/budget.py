from __future__ import annotations

from typing import Any

import torch

from pyllm.engine.pool import AttentionPool, RecurrentPool
from pyllm.engine.sources import SourcePool
from pyllm.models import Model
from pyllm.nn import AttentionState, RecurrentState, SourceState
from pyllm.nn.state import PAGE_SIZE


def new_pool(model: Model, max_sequences: int, num_pages: int | None, max_length: int | None, reuse: bool) -> Any:
    """The pool for a model's kind of state.

    Raises:
        ValueError: a model without a limit to its context needs max_length or num_pages.
        TypeError: a state of another kind.
    """
    if model.answers:
        one = torch.ones(1, dtype=torch.int64)
        state = model.begin(one[None] - 1, one, 1)[0]
    else:
        state = model.new_state(1, 1)
    if isinstance(state, RecurrentState):
        return RecurrentPool(state.vectors, max_sequences, reuse)
    if not isinstance(state, AttentionState):
        raise TypeError(f"an engine must get a model with an AttentionState or a RecurrentState, but got one with a "
                        f"{type(state).__name__}")  # fmt: skip
    longest = model.context_length if max_length is None else max_length
    if num_pages is None:
        if longest is None:
            raise ValueError("max_length or num_pages must be given, as the model's context has no limit")
        num_pages = max_sequences * pages_for(model, longest, longest if model.answers else 1)
    if isinstance(state, SourceState):
        return SourcePool(model, state, num_pages, longest or num_pages * PAGE_SIZE)
    return AttentionPool(model, state.caches, num_pages, model.context_length or num_pages * PAGE_SIZE, reuse)


def pages_for(model: Model, length: int, max_tokens: int) -> int:
    """How many pages a request with a prompt of so many ids, and so many more, needs."""
    parts = (length, max_tokens) if model.answers else (length + max_tokens - 1,)
    return sum(-(-n // PAGE_SIZE) for n in parts)
