from __future__ import annotations

import itertools
import time
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
        self.steps, self.rows, self.fit = steps, list[Any](), False
        self.plain = type(steps.model).constrain is Model.constrain
        self.settings = {name: torch.zeros(count, dtype=dtype) for name, dtype in SETTINGS.items()}
        self.settings["seeds"] = torch.zeros(count, dtype=torch.int64)
        self.positions = torch.zeros(count, dtype=torch.int64)
        self.numbers = self.positions.numpy()
        # By the number of rows: the step, what draws, what it fills, and where that and who has ended is kept of one.
        self.recorded: dict[int, tuple[Any, Any, list[Tensor], list[Tensor], Tensor]] = {}
        self.count, self.took = 1, 0.0  # of the last: how many steps, and the seconds that each took
        self.continued: list[Any] | None = None  # rows whose next ids and positions are where a step reads them

    def __call__(self, rows: list[Any], seconds: float,
                 steps: int | None = None) -> tuple[list[tuple[list[Any], ...]], Tensor | None]:  # fmt: skip
        """Steps of those who are seated, so many at the most and for about so many seconds, or one if that is 0, until
        one has drawn an id that ends it or has all that it may.

        Returns:
            The ids, log-probabilities and processed log-probabilities that each row has drawn; and the logits of one
            more step, (rows, vocabulary), until the next call, that have not been drawn from.
        """
        if rows != self.rows:
            self.took *= max(1.0, len(rows) / max(len(self.rows), 1))  # at most: a step of more takes longer
            self._gather(rows)
            self.count = max(1, int(seconds / self.took)) if self.took else 1
        continues, self.continued = rows is self.continued, None
        found = self.steps.program(continues)
        if found is None or not self.fit:
            return [([], [], []) for _ in rows], self.steps.replay(found)
        program, logits = found
        count = len(rows)
        draw, results, kept, ended = self._recorded(count, program, logits)
        if not continues:
            self.numbers[:count] = [len(row.sequence) for row in rows]
            ended.zero_()
        most = 1 if seconds == 0 or steps == 1 else self.count
        if most > 1:
            most = min(most, min(row.max_tokens - len(row.ids) for row in rows), steps or most)
            kept = [torch.empty(most, count, dtype=t.dtype) for t in results]
        began = time.perf_counter()
        try:
            program.generate(draw, results, kept, ended, self.stop_ids, True)
        except Exception:
            if program.steps_run == program.steps_done:
                self.steps.asked = []  # nobody knows the lengths
                raise
        done = program.steps_done
        self.took = (time.perf_counter() - began) / max(done, 1)
        if seconds > 0:
            self.count = max(1, min(2 * self.count, int(seconds / max(self.took, 1e-6))))
        if done == 1:  # for which calls would take longer
            drawn = [[[x] for x in t.tolist()[0]] for t in kept]
        else:
            drawn = [t.numpy()[:done].T.tolist() for t in kept]
        if program.steps_run == done:
            self.continued = rows
        return list(zip(*drawn, strict=True)), logits if program.steps_run > done else None

    def _gather(self, rows: list[Any]) -> None:
        here = self.steps.ids.device.type == "cpu"  # no graph draws
        self.fit = self.plain and here and not any(row.params.looks_back or row.bias is not None for row in rows)
        self.rows = list(rows)
        if not self.fit:
            return
        for name, own in self.settings.items():
            own[: len(rows)] = torch.tensor([getattr(row.params, name if name != "seeds" else "seed") for row in rows])
        self.stop_ids = list(set(itertools.chain(*(row.stop_ids for row in rows))))

    def _recorded(self, count: int, program: Any,
                  logits: Tensor) -> tuple[Any, list[Tensor], list[Tensor], Tensor]:  # fmt: skip
        found = self.recorded.get(count)
        if found is None or found[0] is not program:
            positions = self.positions[:count]
            with Recording() as draw:
                sample = ops.sample(logits, positions=positions,
                                    **{name: t[:count] for name, t in self.settings.items()})  # fmt: skip
                self.steps.ids[:count, 0] = sample.ids
                positions += 1
            one = [torch.empty(1, count, dtype=t.dtype) for t in sample]
            found = self.recorded[count] = program, draw, list(sample), one, torch.zeros(count, dtype=torch.bool)
        return found[1:]
