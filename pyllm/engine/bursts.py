from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyllm import ops
from pyllm.engine.draws import SETTINGS
from pyllm.engine.recording import Recording
from pyllm.engine.steps import Steps
from pyllm.models import Model


class Bursts:
    """Makes steps of the same sequences without Python, drawing included, several in one call where nothing has to be
    decided between them. As those of `Steps`, what draws is recorded once for each number of rows."""

    def __init__(self, steps: Steps, count: int):
        self.steps, self.rows = steps, list[Any]()
        self.settings = {name: torch.zeros(count, dtype=dtype) for name, dtype in SETTINGS.items()}
        self.settings["seeds"] = torch.zeros(count, dtype=torch.int64)
        self.positions = torch.zeros(count, dtype=torch.int64)
        self.numbers = self.positions.numpy()
        self.recorded: dict[int, tuple[Any, Any, list[Tensor]]] = {}  # by the number of rows: the step, what draws
        self.count, self.took = 1, 0.0  # of the last: how many steps, and the seconds that each took

    def __call__(self, rows: list[Any], seconds: float,
                 steps: int | None = None) -> tuple[list[list[list[Any]]], Tensor | None]:  # fmt: skip
        """Steps of those who are seated, so many at the most and for about so many seconds, or one if that is 0, until
        one has drawn an id that ends it or has all that it may.

        Returns:
            The ids, log-probabilities and processed log-probabilities that each row has drawn; and the logits of one
            more step, (rows, vocabulary), until the next call, that have not been drawn from.
        """
        found = self.steps.program() if self._fit(rows) else None
        if found is None:
            return [[[], [], []] for _ in rows], self.steps.run()
        program, logits = found
        if rows != self.rows:
            self._gather(rows)
        count = len(rows)
        draw, results = self._recorded(count, program, logits)
        self.numbers[:count] = [len(row.sequence) for row in rows]
        most = min(row.max_tokens - len(row.ids) for row in rows)
        most = most if steps is None else min(most, steps)
        kept = [torch.empty(min(self.count, most) if seconds > 0 else 1, count, dtype=t.dtype) for t in results]
        began = time.perf_counter()
        try:
            program.generate(draw, results, kept, torch.zeros(count, dtype=torch.bool), self.stop_ids, True)
        except Exception:
            if program.steps_run == program.steps_done:
                self.steps.asked = []  # nobody knows the lengths
                raise
        done = program.steps_done
        self.took = (time.perf_counter() - began) / max(done, 1)
        if seconds > 0:
            self.count = max(1, min(2 * self.count, int(seconds / max(self.took, 1e-6))))
        drawn = [t[:done].T.tolist() for t in kept]
        return list(map(list, zip(*drawn, strict=True))), logits if program.steps_run > done else None

    def _fit(self, rows: Sequence[Any]) -> bool:
        if self.steps.ids.device.type != "cpu":
            return False  # a captured graph does not draw
        return type(self.steps.model).constrain is Model.constrain and not any(
            row.params.looks_back or row.bias is not None for row in rows)  # fmt: skip

    def _gather(self, rows: list[Any]) -> None:
        for name, own in self.settings.items():
            own[: len(rows)] = torch.tensor([getattr(row.params, name if name != "seeds" else "seed") for row in rows])
        self.stop_ids = list(set(itertools.chain(*(row.stop_ids for row in rows))))
        self.rows, self.count = list(rows), 1

    def _recorded(self, count: int, program: Any, logits: Tensor) -> tuple[Any, list[Tensor]]:
        found = self.recorded.get(count)
        if found is None or found[0] is not program:
            positions = self.positions[:count]
            with Recording() as draw:
                sample = ops.sample(logits, positions=positions,
                                    **{name: t[:count] for name, t in self.settings.items()})  # fmt: skip
                self.steps.ids[:count, 0] = sample.ids
                positions += 1
            found = self.recorded[count] = program, draw, list(sample)
        return found[1:]
