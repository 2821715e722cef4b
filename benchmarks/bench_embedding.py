"""Embedding of 2,048 ids. Forward reads and writes a row an id; backward reads dy and writes all of the gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from pyllm import ops, reference
from pyllm.benchmarks.timing import Case, modes

OPS = ("embedding",)
IDS = 2048
SIZES = [(512, 64), (512, 896), (32000, 64), (32000, 256), (151936, 64), (151936, 896)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases() -> Iterator[Case]:
    for dtype_name, dtype in DTYPES.items():
        for vocabulary, width in SIZES:
            tensors = torch.randint(vocabulary, (IDS,)), torch.randn(vocabulary, width).to(dtype)
            providers = {"pyllm": ops.embedding, "torch": F.embedding, "reference": reference.embedding}
            yield from modes("embedding", f"{vocabulary} x {width} {dtype_name}", providers, tensors,
                             bytes=2 * IDS * width * dtype.itemsize, backward=(IDS + vocabulary) / (2 * IDS),
                             measure=("forward", "forward+backward"))  # fmt: skip
