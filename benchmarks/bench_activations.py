"""Activations. Forward reads its inputs and writes y; backward reads dy and the inputs and writes their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from pyllm import ops, reference
from pyllm.benchmarks.timing import Case, modes

OPS = ("gelu", "silu", "geglu", "swiglu")
SIZES = [(1, 896), (1, 4864), (32, 4864), (512, 4864), (4096, 4864)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TORCH: dict[str, Callable] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "swiglu": lambda gate, up: F.silu(gate) * up,
}


def cases() -> Iterator[Case]:
    for dtype_name, dtype in DTYPES.items():
        for rows, width in SIZES:
            for op in OPS:
                inputs = [torch.randn(rows, width).to(dtype) for _ in range(2 if "glu" in op else 1)]
                providers = {"pyllm": getattr(ops, op), "torch": TORCH[op], "reference": getattr(reference, op)}
                yield from modes(op, f"{rows} x {width} {dtype_name}", providers, inputs,
                                 bytes=(len(inputs) + 1) * inputs[0].nbytes,
                                 backward=(2 * len(inputs) + 1) / (len(inputs) + 1))  # fmt: skip
