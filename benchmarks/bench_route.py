"""Routing to experts: logits are read, and what is written is small; torch's softmax, topk and sort beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pyllm import ops, reference
from pyllm.benchmarks.timing import DTYPES, Case, modes

OPS = ("route",)
SIZES = {  # (rows, experts, active)
    "tiny": [(5, 4, 2)],
    "small": [(512, 8, 2)],
    "usual": [(1, 8, 2), (512, 128, 8)],
    "full": [(1, 8, 2), (512, 8, 2), (1, 128, 8), (512, 128, 8)],
}


def cases(sizes: str) -> Iterator[Case]:
    for dtype in DTYPES:
        for rows, experts, active in SIZES[sizes]:
            yield from _route(rows, experts, active, dtype)


def _route(rows: int, experts: int, active: int, dtype: str) -> Iterator[Case]:
    def by_torch(x):
        weights, chosen = x.softmax(-1, dtype=torch.float32).topk(active, -1)
        chosen.flatten().sort(stable=True)
        return weights / weights.sum(-1, keepdim=True)

    functions = {
        "pyllm": lambda x: ops.route(x, active=active).weights,
        "torch": by_torch,
        "reference": lambda x: reference.route(x, active=active).weights,
    }
    yield from modes("route", f"{rows} rows, {active} of {experts} experts {dtype}", functions,
                     lambda: [torch.randn(rows, experts).to(DTYPES[dtype])],
                     bytes=rows * (experts * DTYPES[dtype].itemsize + 20 * active), backward=1)  # fmt: skip
