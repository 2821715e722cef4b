"""What an engine's sequences remember, of either kind: pages of keys and values, or slots of vectors. A pool admits
sequences, joins some of them to the state of a call of the model, and takes back what the call changed. Its seats are
the state of those that are read an id at a time, which stays where it is as sequences come and go."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyllm import nn
from pyllm.engine.pages import Holding, Pages
from pyllm.models import Model
from pyllm.nn import AttentionState, KeyValueCache, RecurrentState
from pyllm.nn.state import PAGE_SIZE
from pyllm.ops.paging import new_pages


class AttentionPool:
    """Pages of all layers' keys and values. Layers that all have a window give back what lies before it."""

    longest: int | None = None  # positions, where it is less than `most`

    def __init__(self, model: Model, caches: Sequence[KeyValueCache], num_pages: int, longest: int, reuse: bool,
                 dtype: torch.dtype | None = None):  # fmt: skip
        def pool(t: Tensor) -> Tensor:
            # One more page than there are, for what is padding.
            return new_pages(num_pages + 1, *t.shape[1:], dtype=dtype or t.dtype, device=t.device)

        self.caches = [KeyValueCache(pool(c.keys), pool(c.values), c.page_table) for c in caches]
        self.pages = Pages(num_pages, PAGE_SIZE, reuse=reuse)
        self.most = num_pages * PAGE_SIZE  # positions of the longest sequence that could ever be admitted
        self.width = min(self.pages.needed(longest), num_pages)  # pages of the longest that is admitted
        windows = [m.window for m in model.modules() if isinstance(m, nn.Attention) and m.causal]
        self.window = None if None in windows else max(w for w in windows if w is not None)

    def admit(self, ids: Sequence[int], positions: int, source: Sequence[int] = ()) -> Holding | None:
        holding = self.pages.take(ids, positions)
        if holding is not None and holding.copy is not None:
            self._copy(*holding.copy)
            self.pages.copied(holding)
        return holding

    def room(self, positions: int, source_length: int = 0) -> int:
        """How many sequences of so many positions fit, with what all of them answer, if there are no others."""
        return (self.pages.count - self.pages.needed(source_length)) // max(self.pages.needed(positions), 1)

    def join(self, held: Sequence[Holding], count: int = 1) -> AttentionState:
        """Their state, for so many ids of each."""
        width = max(*(len(h.pages) for h in held), *(self.pages.needed(h.length + count) for h in held))
        state = self._state(len(held), width)
        self.fill(state, held)
        return state

    def blank(self, rows: int, count: int) -> AttentionState:
        """A state that any so many sequences `fill`, for so many ids of each."""
        return self._state(rows, self.width + self.pages.needed(count))

    def _state(self, rows: int, width: int) -> AttentionState:
        table = torch.empty(rows, width, dtype=torch.int32, device=self.caches[0].keys.device)
        return AttentionState([KeyValueCache(c.keys, c.values, table) for c in self.caches], width * PAGE_SIZE)

    def fill(self, state: AttentionState, held: Sequence[Holding]) -> None:
        """Makes it that of sequences."""
        table = state.caches[0].page_table
        own = torch.full(table.shape, self.pages.count, dtype=torch.int32)
        for row, h in zip(own, held, strict=True):
            row[: len(h.pages)] = torch.tensor([p or 0 for p in h.pages], dtype=torch.int32)
        table.copy_(own)
        state.lengths.copy_(torch.tensor([h.length for h in held]))

    def seats(self, count: int) -> AttentionSeats:
        return AttentionSeats(self, count)

    def advance(self, rows: Sequence[Any], more: Iterable[Sequence[int]] = itertools.repeat(())) -> None:
        """Each has its last id written and, where `more` follow it, all of those but the last."""
        for row, ids in zip(rows, more, strict=False):
            holding = row.held
            count = len(ids) or 1
            holding.length += count
            if holding.length % PAGE_SIZE < count:  # a page is full
                self.note(holding, [*row.sequence, *ids] if ids else row.sequence, holding.length)
            elif self.window is not None:
                self.pages.slide(holding, holding.length - self.window)

    def note(self, holding: Holding, ids: Sequence[int], length: int) -> None:
        self.pages.note(holding, ids, length)
        if self.window is not None:
            self.pages.slide(holding, length - self.window)

    def part(self, held: Sequence[Holding], state: AttentionState) -> None:
        """The state is done with: all that it wrote is in the pages."""

    def reset(self, holding: Holding, most: int) -> None:
        """After a step that was broken off: what is noted is written, and what comes after `most` ids is again."""
        holding.length = min(holding.length, most)

    def fork(self, holding: Holding, length: int) -> Holding | None:
        """Another sequence that goes on from the first positions of one; None if there is no room, or where what it
        sees has been given back."""
        seen = 0 if self.window is None else max(0, length - self.window)
        if None in holding.pages[seen // PAGE_SIZE : length // PAGE_SIZE + 1]:
            return None
        made = self.pages.fork(holding, length)
        if made is None:
            return None
        twin, copied = made
        if copied is not None:
            self._copy(*copied)
        return twin

    def _copy(self, source: int, target: int) -> None:
        for cache in self.caches:
            for t in (cache.keys, cache.values):
                t[target] = t[source]

    def give(self, holding: Holding, ids: Sequence[int] = ()) -> None:
        """Takes back what a sequence held, of which the ids are known, if they are given."""
        if ids:
            self.pages.note(holding, ids, min(holding.length, len(ids)))
        self.pages.give(holding)

    def forget(self) -> None:
        """The model has changed: what is known of prompts holds no longer."""
        self.pages.forget()


class AttentionSeats:
    def __init__(self, pool: AttentionPool, count: int):
        self.caches = pool.caches
        device = self.caches[0].keys.device
        self.table = torch.zeros(count, pool.width, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(count, dtype=torch.int64, device=device)

    def state(self, count: int) -> AttentionState:
        """That of the first so many seats."""
        table = self.table[:count]
        state = AttentionState([KeyValueCache(c.keys, c.values, table) for c in self.caches],
                               table.shape[1] * PAGE_SIZE)  # fmt: skip
        state.lengths = self.lengths[:count]
        return state

    def place(self, held: Sequence[Holding], ahead: Sequence[int]) -> None:
        """Seats sequences, in place of those who sat here, each so many positions beyond its length."""
        for h in held:
            if h.row is None:
                h.row = torch.zeros(self.table.shape[1], dtype=torch.int32)
                h.row[: len(h.pages)] = torch.tensor([p or 0 for p in h.pages], dtype=torch.int32)
        if not held:
            return
        self.table[: len(held)] = torch.stack([h.row for h in held])
        self.lengths[: len(held)] = torch.tensor([h.length + more for h, more in zip(held, ahead, strict=True)])

    def clear(self) -> None:
        """What is in the pages stays there."""


class Slot:
    """One sequence's vectors, (layers, ...) each, unless they are in a seat, and how many ids they have seen."""

    def __init__(self, vectors: list[Tensor]):
        self.vectors, self.length, self.seated, self.ended, self.private = vectors, 0, False, False, False


class RecurrentPool:
    """So many slots of a recurrent model's vectors, and at most as many copies of what they were at the ends of pieces
    of prompts, from which others go on that begin with the same ids: the oldest go first."""

    most = longest = None

    def __init__(self, vectors: Sequence[Tensor], count: int, reuse: bool):
        self.first, self.free, self.count = [v.select(1, 0).clone() for v in vectors], count, count
        self.reuse, self.known = reuse, OrderedDict[tuple[int, ...], list[Tensor]]()

    def admit(self, ids: Sequence[int], positions: int, source: Sequence[int] = ()) -> Slot | None:
        if self.free == 0:
            return None
        self.free -= 1
        lengths = sorted({len(k) for k in self.known if len(k) < len(ids)}, reverse=True)
        found = next((key for n in lengths if (key := tuple(ids[:n])) in self.known), ())
        if found:
            self.known.move_to_end(found)
        slot = Slot([v.clone() for v in self.known.get(found, self.first)])
        slot.length = len(found)
        return slot

    def room(self, positions: int, source_length: int = 0) -> int:
        return self.count

    def join(self, held: Sequence[Slot], count: int = 1) -> RecurrentState:
        state = RecurrentState(*(torch.stack(vectors, 1) for vectors in zip(*(h.vectors for h in held), strict=True)))
        state.lengths.copy_(torch.tensor([h.length for h in held]))
        return state

    def seats(self, count: int) -> RecurrentSeats:
        return RecurrentSeats(self, count)

    def advance(self, rows: Sequence[Any], more: Iterable[Sequence[int]] = itertools.repeat(())) -> None:
        for row, ids in zip(rows, more, strict=False):
            row.held.length += len(ids) or 1

    def note(self, slot: Slot, ids: Sequence[int], length: int) -> None:
        slot.length = length
        if self.reuse and not slot.seated and not slot.private and length >= PAGE_SIZE:  # less is soon read again
            self.known[tuple(ids[:length])] = [v.clone() for v in slot.vectors]
            if len(self.known) > self.count:
                self.known.popitem(last=False)

    def part(self, held: Sequence[Slot], state: RecurrentState) -> None:
        for i, slot in enumerate(held):
            slot.vectors = [v.select(1, i).clone() for v in state.vectors]

    def reset(self, slot: Slot, most: int) -> None:
        """After a step that was broken off: begins again, as nobody knows how far the vectors are."""
        slot.vectors, slot.length = [v.clone() for v in self.first], 0

    def fork(self, slot: Slot, length: int) -> Slot | None:
        """Another sequence that goes on from where one is; None if there is no room, or if it has gone on itself."""
        if self.free == 0 or slot.length != length or slot.seated:
            return None
        self.free -= 1
        twin = Slot([v.clone() for v in slot.vectors])
        twin.length = length
        return twin

    def give(self, slot: Slot, ids: Sequence[int] = ()) -> None:
        slot.ended = True
        self.free += 1

    def forget(self) -> None:
        """The model has changed: what is known of prompts holds no longer."""
        self.known.clear()


class RecurrentSeats:
    def __init__(self, pool: RecurrentPool, count: int):
        self.vectors = [v.new_zeros(v.shape[0], count, *v.shape[1:]) for v in pool.first]
        self.lengths = torch.zeros(count, dtype=torch.int64, device=self.vectors[0].device)
        self.held: list[Slot] = []

    def state(self, count: int) -> RecurrentState:
        """That of the first so many seats."""
        state = RecurrentState(*(v[:, :count] for v in self.vectors))
        state.lengths = self.lengths[:count]
        return state

    def place(self, held: Sequence[Slot], ahead: Sequence[int]) -> None:
        """Seats sequences. Those who sat here before and go on come first, as far as they can where they were.
        None can be ahead of its length."""
        before = {slot: i for i, slot in enumerate(self.held)}
        for slot in before.keys() - set(held):
            slot.seated = False
            if not slot.ended:
                for own, v in zip(slot.vectors, self.vectors, strict=True):
                    own.copy_(v[:, before[slot]])
        moved = [(i, slot) for i, slot in enumerate(held) if before.get(slot) != i]
        new = [[v[:, before[slot]].clone() for v in self.vectors] if slot in before else slot.vectors
               for _, slot in moved]  # fmt: skip
        for (i, _), vectors in zip(moved, new, strict=True):
            for v, own in zip(self.vectors, vectors, strict=True):
                v[:, i] = own
        self.held = list(held)
        for slot in held:
            slot.seated = True

    def clear(self) -> None:
        """What is in the seats is nobody's."""
        for slot in self.held:
            slot.seated = False
        self.held = []
