"""What an engine's sequences remember, of either kind: pages of keys and values, or slots of vectors. A pool admits
sequences, joins some of them to the state of a call of the model, and takes back what the call changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyllm import nn
from pyllm.engine.pages import Holding, Pages
from pyllm.models import Model
from pyllm.nn import AttentionState, KeyValueCache, RecurrentState, SourceState
from pyllm.nn.state import PAGE_SIZE


class AttentionPool:
    """Pages of all layers' keys and values. Layers that all have a window give back what lies before it."""

    def __init__(self, model: Model, caches: Sequence[KeyValueCache], num_pages: int, reuse: bool):
        def pool(t: Tensor) -> Tensor:
            return t.new_zeros(num_pages, *t.shape[1:])

        self.caches = [KeyValueCache(pool(c.keys), pool(c.values), c.page_table) for c in caches]
        self.pages = Pages(num_pages, PAGE_SIZE, reuse=reuse)
        self.most = num_pages * PAGE_SIZE  # positions of the longest sequence that could ever be admitted
        windows = [m.window for m in model.modules() if isinstance(m, nn.Attention) and m.causal]
        self.window = None if None in windows else max(w for w in windows if w is not None)

    def admit(self, ids: Sequence[int], positions: int) -> Holding | None:
        return self.pages.take(ids, positions)

    def join(self, held: Sequence[Holding]) -> AttentionState:
        width = max(len(h.pages) for h in held)
        table = torch.zeros(len(held), width, dtype=torch.int32)
        for row, h in zip(table, held, strict=True):
            row[: len(h.pages)] = torch.tensor([p or 0 for p in h.pages], dtype=torch.int32)
        caches = [KeyValueCache(c.keys, c.values, table) for c in self.caches]
        state = AttentionState(caches, width * PAGE_SIZE)
        state.lengths.copy_(torch.tensor([h.length for h in held]))
        return state

    def note(self, holding: Holding, ids: Sequence[int], length: int) -> None:
        self.pages.note(holding, ids, length)
        if self.window is not None:
            self.pages.slide(holding, length - self.window)

    def part(self, held: Sequence[Holding], state: AttentionState) -> None:
        """The state is done with: all that it wrote is in the pages."""

    def reset(self, holding: Holding, most: int) -> None:
        """After a step that was broken off: what is noted is written, and what comes after `most` ids is again."""
        holding.length = min(holding.length, most)

    def give(self, holding: Holding) -> None:
        self.pages.give(holding)


class Slot:
    """One sequence's vectors, (layers, ...) each, and how many ids they have seen."""

    def __init__(self, vectors: list[Tensor]):
        self.vectors, self.length = vectors, 0


class RecurrentPool:
    """So many slots of a recurrent model's vectors."""

    most = None

    def __init__(self, vectors: Sequence[Tensor], count: int):
        self.first, self.free = [v.select(1, 0).clone() for v in vectors], count

    def admit(self, ids: Sequence[int], positions: int) -> Slot | None:
        if self.free == 0:
            return None
        self.free -= 1
        return Slot([v.clone() for v in self.first])

    def join(self, held: Sequence[Slot]) -> RecurrentState:
        state = RecurrentState(*(torch.stack(vectors, 1) for vectors in zip(*(h.vectors for h in held), strict=True)))
        state.lengths.copy_(torch.tensor([h.length for h in held]))
        return state

    def note(self, slot: Slot, ids: Sequence[int], length: int) -> None:
        slot.length = length

    def part(self, held: Sequence[Slot], state: RecurrentState) -> None:
        for i, slot in enumerate(held):
            slot.vectors = [v.select(1, i).clone() for v in state.vectors]

    def reset(self, slot: Slot, most: int) -> None:
        """After a step that was broken off: begins again, as nobody knows how far the vectors are."""
        slot.vectors, slot.length = [v.clone() for v in self.first], 0

    def give(self, slot: Slot) -> None:
        self.free += 1


def new_pool(model: Model, max_sequences: int, num_pages: int | None, max_length: int | None, reuse: bool) -> Any:
    """The pool for a model's kind of state.

    Raises:
        ValueError: a model without a limit to its context needs max_length or num_pages.
        TypeError: a state of another kind.
    """
    state = model.new_state(1, 1)
    if isinstance(state, RecurrentState):
        return RecurrentPool(state.vectors, max_sequences)
    if not isinstance(state, AttentionState) or isinstance(state, SourceState):
        raise TypeError(f"an engine must get a model with an AttentionState or a RecurrentState, but got one with a "
                        f"{type(state).__name__}")  # fmt: skip
    if num_pages is None:
        longest = model.context_length if max_length is None else max_length
        if longest is None:
            raise ValueError("max_length or num_pages must be given, as the model's context has no limit")
        num_pages = max_sequences * -(-longest // PAGE_SIZE)
    return AttentionPool(model, state.caches, num_pages, reuse)
