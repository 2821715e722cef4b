"""Sampling, which must read the logits once. torch's column is the shortest program of its own operations for the same
draw (which returns no log-probabilities); top-p alone has to sort there, as the usual logits processors do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyllm import ops, reference
from pyllm.benchmarks.timing import Case, Providers

OPS = ("sample",)
SIZES = {  # (rows, vocabulary)
    "tiny": [(2, 11)],
    "small": [(1, 1024)],
    "usual": [(1, 151_936), (32, 32_000)],
    "full": [(1, 512), (1, 32_000), (1, 151_936), (32, 512), (32, 32_000), (32, 151_936)],
}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top-k 50, top-p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top-p 0.9 at 0.1": {"temperature": 0.1, "top_p": 0.9},  # most weights underflow
    "min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
}
TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "greedy": lambda x: x.argmax(-1),
    "plain": lambda x: torch.multinomial(x.softmax(-1), 1),
    "top-k 50, top-p 0.9": lambda x: _from_sorted(x / 0.8, 50, 0.9),
    "top-p 0.9": lambda x: _from_sorted(x / 0.8, x.shape[1], 0.9),
    "top-p 0.9 at 0.1": lambda x: _from_sorted(x / 0.1, x.shape[1], 0.9),
    "min-p 0.05": lambda x: _above(x / 0.8, 0.05),
}


def cases(sizes: str) -> Iterator[Case]:
    for rows, vocabulary in SIZES[sizes]:
        for name in SETTINGS if sizes != "small" else ["top-k 50, top-p 0.9"]:
            yield _sample(rows, vocabulary, name)


def _sample(rows: int, vocabulary: int, name: str) -> Case:
    def setup() -> Providers:
        logits = torch.randn(rows, vocabulary) * 2
        options = {"seeds": 1, "positions": torch.arange(rows), **SETTINGS[name]}
        return {
            "pyllm": lambda: ops.sample(logits, **options),
            "torch": lambda: TORCH[name](logits),
            "reference": lambda: reference.sample(logits, **options),
        }

    return Case("sample", f"{rows} x {vocabulary}, {name} fp32", setup, bytes=4 * rows * vocabulary)


def _from_sorted(logits: Tensor, k: int, p: float) -> Tensor:
    values, ids = torch.topk(logits, k) if k < logits.shape[1] else torch.sort(logits, descending=True)
    weights = values.softmax(-1)
    weights[weights.cumsum(-1) - weights >= p] = 0
    return ids.gather(1, torch.multinomial(weights, 1))


def _above(logits: Tensor, share: float) -> Tensor:
    weights = logits.softmax(-1)
    weights[weights < share * weights.amax(-1, keepdim=True)] = 0
    return torch.multinomial(weights, 1)
