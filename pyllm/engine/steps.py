from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyllm.engine.capture import Captured
from pyllm.engine.recording import Memory, NotRecordable, Recording
from pyllm.models import Model
from pyllm.ops.linear import reading_copies


class Steps:
    """Reads one id of each of up to `count` sequences together.

    What differs from step to step lies in tensors that stay, so that a step is recorded once for each number of rows,
    and sequences come and go without another recording. The results of all these steps share their memory.
    """

    def __init__(self, model: Model, pool: Any, count: int):
        self.model, self.seats = model, pool.seats(count)
        self.ids = torch.zeros(count, 1, dtype=torch.int64, device=model.device)
        self.on_host = self.ids.cpu()  # the same memory, if the model is on the CPU
        self.numbers = self.on_host.numpy()[:, 0]
        self.asked: list[Any] = []
        self.rows: list[Any] = []
        self.forget()

    def forget(self) -> None:
        """The model has changed: what was recorded holds no longer."""
        self.recordable, self.calls = True, 0
        self.recorded: dict[int, tuple[Any, Tensor]] = {}  # by the number of rows: the program and its logits
        self.memory, self.graphs = Memory(), list[Any]()  # what recordings, and what captures, share

    def clear(self) -> None:
        """Nobody sits any more, and nobody knows what was in the seats."""
        self.seats.clear()
        self.asked, self.rows = [], []

    def place(self, rows: list[Any]) -> list[Any]:
        """Seats requests; who was there stays, as far as can be, and the order is that of the seats. Rows that stand
        `ahead` of what their request holds keep theirs: where there are such, they come with those between."""
        if rows != self.asked:
            if any(row.ahead for row in rows):
                self.rows = rows
            else:
                seated = [row if row in rows else None for row in self.rows[: len(rows)]]
                new = iter([row for row in rows if row not in seated])
                self.rows = [next(new) if row is None else row for row in seated] + list(new)
            self.seats.place([row.held for row in self.rows], [row.ahead for row in self.rows])
            self.asked = rows
        return self.rows

    def program(self, continues: bool = False) -> tuple[Any, Tensor] | None:
        """What is recorded of reading the last id of each that is seated, and its logits; None if that is not. Where
        this `continues` what a step drew, that is in its place already."""
        count = len(self.rows)
        if not continues:
            self.numbers[:count] = [row.sequence[-1] for row in self.rows]
            if self.on_host is not self.ids:
                self.ids[:count] = self.on_host[:count]
        return self.recorded.get(count) or self._record(count)

    def run(self) -> Tensor:
        """Reads the last id of each that is seated: logits (rows, vocabulary), until the next call."""
        return self.replay(self.program())

    def replay(self, found: tuple[Any, Tensor] | None) -> Tensor:
        """The same by what `program` gave."""
        try:
            if found is None:
                return self._step(len(self.rows))
            found[0].run()
            return found[1]
        except BaseException:
            self.asked = []  # nobody knows the lengths
            raise

    def _record(self, count: int) -> tuple[Any, Tensor] | None:
        """A single step is not worth its recording, for which weights are packed."""
        self.calls += 1
        if self.calls == 1 or not self.recordable:
            return None
        try:
            if self.ids.is_cuda:
                captured = Captured(lambda: self._step(count), self.graphs, self.ids.device)
                self.recorded[count] = captured, captured.out
            else:
                with Recording(self.memory) as program:
                    logits = self._step(count)
                self.recorded[count] = program, logits
        except NotRecordable:
            self.recordable = False
            return None
        return self.recorded[count]

    def _step(self, count: int) -> Tensor:
        with reading_copies():
            return self.model.head(self.model.hidden(self.ids[:count], self.seats.state(count))[:, 0])
