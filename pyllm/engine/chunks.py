from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyllm.engine.pieces import Piece
from pyllm.engine.pool import AttentionPool
from pyllm.engine.recording import NotRecordable, Recording
from pyllm.engine.steps import Steps
from pyllm.ops.linear import reading_copies


class Chunks:
    """Reads the next ids of some sequences in one call of the model. Where one of so many sequences and ids has been
    made before, it is recorded, for which numbers of ids are rounded up to a multiple of `unit`: what follows a piece
    is padding, of which nobody sees anything. Recordings share the memory of those of steps."""

    def __init__(self, steps: Steps, pool: Any, unit: int):
        self.steps, self.model, self.pool, self.unit = steps, steps.model, pool, unit
        self.forget()

    def forget(self) -> None:
        """The model has changed: what was recorded holds no longer."""
        self.made: set[tuple[int, int]] = set()  # calls of so many sequences and ids
        self.recorded: dict[tuple[int, int], tuple[Any, ...]] = {}

    def __call__(self, batch: list[Piece]) -> Tensor:
        """The vectors (pieces, T, hidden) that the model's head would read, of T at least as many as the longest has,
        until the next call."""
        longest, context = max(p.length for p in batch), self.model.context_length
        shape = len(batch), -(-longest // self.unit) * self.unit
        beyond = context is not None and max(p.first for p in batch) + shape[1] > context
        fit = isinstance(self.pool, AttentionPool) and not self.steps.ids.is_cuda  # else none stay where they are
        if not fit or beyond or batch[0].request.hooks is not None:
            return self._run(batch, longest)
        found = self.recorded.get(shape)
        if found is None and shape in self.made:
            found = self._record(*shape)
        if found is None:
            self.made.add(shape)
            return self._run(batch, longest)
        program, state, ids, lengths, hidden = found
        self.pool.fill(state, [p.request.held for p in batch])
        _fill(ids, batch)
        lengths.copy_(torch.tensor([p.length for p in batch]))
        program.run()
        return hidden

    def _run(self, batch: list[Piece], longest: int) -> Tensor:
        held, lengths = [p.request.held for p in batch], None
        ids = torch.empty(len(batch), longest, dtype=torch.int64)
        _fill(ids, batch)
        ids = ids.to(self.model.device)
        if any(p.length < longest for p in batch):
            lengths = torch.tensor([p.length for p in batch], device=ids.device)
        state = self.pool.join(held, longest)
        with batch[0].request.watching(batch[0].first, longest), reading_copies():
            hidden = self.model.hidden(ids, state, lengths)
        self.pool.part(held, state)
        return hidden

    def _record(self, count: int, longest: int) -> tuple[Any, ...] | None:
        if not self.steps.recordable:
            return None
        ids, lengths = torch.zeros(count, longest, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
        state = self.pool.blank(count, longest)
        try:
            with Recording(self.steps.memory) as program:
                hidden = self.model.hidden(ids, state, lengths)
        except NotRecordable:
            self.steps.recordable = False
            return None
        found = self.recorded[count, longest] = program, state, ids, lengths, hidden
        return found


def _fill(ids: Tensor, batch: list[Piece]) -> None:
    """The ids of pieces to (pieces, T), and zeros behind them."""
    for row, piece in zip(ids.numpy(), batch, strict=True):
        row[: piece.length] = piece.request.sequence[piece.first : piece.end]
        row[piece.length :] = 0
