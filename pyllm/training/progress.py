from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """A live bar with loss, tokens/s and time left; where the output is no terminal, a line every ten seconds."""

    def __init__(self, total: int, done: int = 0, *, enabled: bool = True):
        self.total, self.done, self.enabled = total, done, enabled
        self.console = Console(stderr=True)
        self.loss: float | None = None
        self.rate = 0.0
        self.last, self.last_line = time.perf_counter(), time.perf_counter()
        self.bar = None
        if enabled and self.console.is_terminal:
            self.bar = Bar(TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
                           TimeRemainingColumn(), console=self.console, transient=True)  # fmt: skip
            self.task = self.bar.add_task("training", total=total, completed=done, note="")

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception):
        if self.bar:
            self.bar.stop()

    def step(self, loss: float, tokens: int) -> None:
        now = time.perf_counter()
        rate, self.last, self.done = tokens / (now - self.last), now, self.done + 1
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        self.rate = rate if not self.rate else 0.95 * self.rate + 0.05 * rate
        note = f"loss {self.loss:.3f}  {self.rate:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.task, advance=1, note=note)
        elif self.enabled and now - self.last_line > 10:
            self.last_line = now
            self.console.print(f"step {self.done} of {self.total}  {note}", highlight=False)
