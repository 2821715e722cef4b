"""Sampling, which must read the logits once. torch's column is the shortest program of its own operations for the same
draw (which returns no log-probabilities); top-p alone has to sort there, as the usual logits
processors do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyllm import ops, reference
from pyllm.benchmarks.timing import Case

OPS = ("sample",)
SIZES = [(1, 512), (1, 32_000), (1, 151_936), (32, 512), (32, 32_000), (32, 151_936)]
SETTINGS: dict[str, dict] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top-k 50, top-p 0.9": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "min-p 0.05": {"temperature": 0.8, "min_p": 0.05},
}


def from_sorted(logits: Tensor, k: int, p: float) -> Tensor:
    values, ids = torch.topk(logits, k) if k < logits.shape[1] else torch.sort(logits, descending=True)
    weights = values.softmax(-1)
    weights[weights.cumsum(-1) - weights >= p] = 0
    return ids.gather(1, torch.multinomial(weights, 1))


def above(logits: Tensor, share: float) -> Tensor:
    weights = logits.softmax(-1)
    weights[weights < share * weights.amax(-1, keepdim=True)] = 0
    return torch.multinomial(weights, 1)


def cases() -> Iterator[Case]:
    for rows, vocab in SIZES:
        logits, positions = torch.randn(rows, vocab) * 2, torch.arange(rows)
        theirs: dict[str, Callable[[], object]] = {
            "greedy": lambda x=logits: x.argmax(-1),
            "plain": lambda x=logits: torch.multinomial(x.softmax(-1), 1),
            "top-k 50, top-p 0.9": lambda x=logits: from_sorted(x / 0.8, 50, 0.9),
            "top-p 0.9": lambda x=logits: from_sorted(x / 0.8, x.shape[1], 0.9),
            "min-p 0.05": lambda x=logits: above(x / 0.8, 0.05),
        }
        for name, settings in SETTINGS.items():
            options = {"seeds": 1, "positions": positions, **settings}
            providers: dict[str, Callable[[], object]] = {
                "pyllm": lambda x=logits, o=options: ops.sample(x, **o),
                "torch": theirs[name],
                "reference": lambda x=logits, o=options: reference.sample(x, **o),
            }
            yield Case("sample", f"{rows} x {vocab} {name}", providers, bytes=logits.nbytes)
