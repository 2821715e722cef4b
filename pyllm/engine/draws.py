from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyllm import ops
from pyllm.runtime import raise_found

SETTINGS = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32,
            "typical_p": torch.float32, "repetition_penalty": torch.float32, "frequency_penalty": torch.float32,
            "presence_penalty": torch.float32}  # fmt: skip


class Draws:
    """Draws the next id of each of some requests, by settings that are gathered anew when the requests change."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self.lengths: list[int] = []
        self.given: dict[str, Any] = {}

    def __call__(self, rows: list[Any], logits: Tensor) -> ops.Sample:
        """logits: (rows, vocabulary)."""
        lengths = [len(row.sequence) for row in rows]
        if rows != self.rows or (self.looks_back and lengths != [n + 1 for n in self.lengths]):
            self.given, self.rows = self._gathered(rows, logits), list(rows)
            self.positions = torch.empty(len(rows), dtype=torch.int64)
            self.numbers = self.positions.numpy()
        elif self.looks_back:
            for own, row, length in zip(self.given["history"], rows, lengths, strict=True):
                own[length - 1] = row.sequence[-1]
        self.lengths = self.numbers[:] = lengths
        drawn = ops.sample(logits, positions=self.positions, **self.given)
        raise_found(logits)
        return drawn

    @property
    def looks_back(self) -> bool:
        return "history" in self.given

    def _gathered(self, rows: list[Any], logits: Tensor) -> dict[str, Any]:
        given: dict[str, Any] = {name: torch.tensor([getattr(row.params, name) for row in rows], dtype=dtype)
                                 for name, dtype in SETTINGS.items()}  # fmt: skip
        given["seeds"] = torch.tensor([row.params.seed for row in rows])
        if any(row.params.looks_back for row in rows):
            history = torch.full((len(rows), max(row.positions + 1 for row in rows)), -1)
            for own, row in zip(history, rows, strict=True):
                own[: len(row.sequence)] = torch.tensor(row.sequence)
            given["history"] = history.to(logits.device)
        if any(row.bias is not None for row in rows):
            none = torch.zeros(logits.shape[1])
            given["logit_bias"] = torch.stack([none if row.bias is None else row.bias for row in rows]).to(
                logits.device
            )
        return given
