"""A product of torch's and an operation of ours in turn, beside as many of each in a row: two sets of threads that get
in each other's way would make the first take longer. The ratio must stay above 1 / 1.1."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from pyllm import ops
from pyllm.benchmarks.timing import Case, Providers

OPS = ("alternation",)
TIMES = 16
SIZES = {  # (rows, width)
    "tiny": [(3, 8)],
    "small": [],
    "usual": [(32, 896)],
    "full": [(1, 896), (32, 896), (512, 896)],
}


def cases(sizes: str) -> Iterator[Case]:
    for rows, width in SIZES[sizes]:
        for op in ("linear", "rms_norm"):
            yield _alternation(op, rows, width)


def _alternation(op: str, rows: int, width: int) -> Case:
    def setup() -> Providers:
        x, weight = torch.randn(rows, width), torch.randn(width, width)
        call: Callable = getattr(ops, op)
        ours = weight if op == "linear" else weight[0]

        def in_turn() -> None:
            for _ in range(TIMES):
                torch.mm(x, weight)
                call(x, ours)

        def in_a_row() -> None:
            for _ in range(TIMES):
                torch.mm(x, weight)
            for _ in range(TIMES):
                call(x, ours)

        return {"pyllm": in_turn, "in a row": in_a_row}

    products = 2 if op == "linear" else 1
    return Case("alternation", f"{TIMES} x mm and {op}, {rows} x {width} fp32", setup,
                flops=TIMES * products * 2 * rows * width**2,
                bytes=TIMES * 4 * products * width**2, against="in a row")  # fmt: skip
