"""What an engine's answers remember of what they answer: each layer's keys and values of a source, in pages of the same
pool as those of the answer, read by all who answer it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyllm import ops
from pyllm.engine.pages import Holding
from pyllm.engine.pool import AttentionPool, AttentionSeats
from pyllm.models import Model
from pyllm.nn import AttentionState, SourceState
from pyllm.nn.state import PAGE_SIZE
from pyllm.runtime import raise_found


class Source:
    """What is answered, the pages that its keys and values have, and whether they are there."""

    def __init__(self, ids: tuple[int, ...], held: Holding, device: torch.device):
        self.ids, self.held, self.users, self.read = ids, held, 0, False
        self.row = torch.tensor(held.pages, dtype=torch.int32, device=device)


class SourcePool(AttentionPool):
    """Pages of answers' keys and values, and of their sources', which live as long as an answer to them."""

    def __init__(self, model: Model, state: SourceState, num_pages: int, longest: int,
                 dtype: torch.dtype | None = None):  # fmt: skip
        super().__init__(model, state.caches, num_pages, longest, reuse=False, dtype=dtype)
        shapes = {t.shape[2:] for c in state.caches for t in (c.keys, c.values)}
        shapes |= {t.shape[2:] for pair in state.sources for t in pair}
        if len(shapes) > 1:
            raise TypeError(f"an engine must get a model whose layers all have keys and values of one shape, but got "
                            f"{', '.join(str(tuple(shape)) for shape in shapes)}")  # fmt: skip
        self.model, self.longest = model, self.width * PAGE_SIZE
        self.live: dict[tuple[int, ...], Source] = {}

    def admit(self, ids: Sequence[int], positions: int, source: Sequence[int] = ()) -> Holding | None:
        key = tuple(source)
        found = self.live.get(key)
        if found is None:
            own = self.pages.take((), len(key))
            if own is None:
                return None
            found = Source(key, own, self.caches[0].keys.device)
        held = super().admit((), positions)
        if held is None:
            if not found.users:
                self.pages.give(found.held)
            return None
        return self._used(held, found)

    def fork(self, holding: Holding, length: int) -> Holding | None:
        twin = super().fork(holding, length)
        return None if twin is None else self._used(twin, holding.source)

    def _used(self, held: Holding, source: Source) -> Holding:
        held.source = self.live[source.ids] = source
        source.users += 1
        return held

    def give(self, holding: Holding, ids: Sequence[int] = ()) -> None:
        super().give(holding, ids)
        holding.source.users -= 1
        if not holding.source.users:
            del self.live[holding.source.ids]
            self.pages.give(holding.source.held)

    def read(self, sources: Sequence[Source]) -> None:
        """Writes the keys and values of sources, which are encoded together."""
        device = self.model.device
        lengths = torch.tensor([len(s.ids) for s in sources], device=device)
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(s.ids) for s in sources], batch_first=True)
        state = self.model.begin(ids.to(device), lengths, 1)[0]
        for i, source in enumerate(sources):
            positions = torch.arange(len(source.ids), device=device)[None]
            for cache, pair in zip(self.caches, state.sources, strict=True):
                for pages, t in zip((cache.keys, cache.values), pair, strict=True):
                    ops.write_pages(pages, t[i : i + 1, : len(source.ids)], source.row[None], positions)
        raise_found(lengths)
        for source in sources:
            source.read = True

    def _state(self, rows: int, width: int) -> SourceState:
        table = torch.zeros(rows, self.width, dtype=torch.int32, device=self.caches[0].keys.device)
        return self.with_sources(super()._state(rows, width), table, table.new_zeros(rows, dtype=torch.int64))

    def fill(self, state: AttentionState, held: Sequence[Holding]) -> None:
        super().fill(state, held)
        assert isinstance(state, SourceState) and state.source_table is not None and state.source_lengths is not None
        _fill_sources(state.source_table, state.source_lengths, held)

    def with_sources(self, state: Any, table: Tensor, lengths: Tensor) -> SourceState:
        made = SourceState(state.caches, state.capacity, [(c.keys, c.values) for c in self.caches], lengths, table)
        made.lengths = state.lengths
        return made

    def seats(self, count: int) -> SourceSeats:
        return SourceSeats(self, count)


class SourceSeats(AttentionSeats):
    def __init__(self, pool: SourcePool, count: int):
        super().__init__(pool, count)
        self.pool = pool
        self.source_table, self.source_lengths = torch.zeros_like(self.table), torch.zeros_like(self.lengths)

    def state(self, count: int) -> SourceState:
        return self.pool.with_sources(super().state(count), self.source_table[:count], self.source_lengths[:count])

    def place(self, held: Sequence[Holding], ahead: Sequence[int]) -> None:
        super().place(held, ahead)
        _fill_sources(self.source_table, self.source_lengths, held)


def _fill_sources(table: Tensor, lengths: Tensor, held: Sequence[Holding]) -> None:
    for row, h in zip(table, held, strict=False):
        row[: len(h.source.row)] = h.source.row
    lengths[: len(held)] = torch.tensor([len(h.source.ids) for h in held])
