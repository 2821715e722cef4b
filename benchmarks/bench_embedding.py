"""Embedding. Forward reads and writes a row an id; backward reads dy and writes all of the gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from pyllm import ops, reference
from pyllm.benchmarks.timing import DTYPES, Case, modes

OPS = ("embedding",)
SIZES = {  # (ids, vocabulary, width)
    "tiny": [(5, 11, 8)],
    "small": [(2048, 1024, 256)],
    "usual": [(2048, 512, 64), (2048, 151936, 896)],
    "full": [(2048, *size) for size in ((512, 64), (512, 896), (32000, 64), (32000, 256), (151936, 64), (151936, 896))],
}


def cases(sizes: str) -> Iterator[Case]:
    for dtype in DTYPES:
        for size in SIZES[sizes]:
            yield from _embedding(*size, dtype)


def _embedding(ids: int, vocabulary: int, width: int, dtype: str) -> Iterator[Case]:
    yield from modes("embedding", f"{ids} of {vocabulary} x {width} {dtype}",
                     {"pyllm": ops.embedding, "torch": F.embedding, "reference": reference.embedding},
                     lambda: [torch.randint(vocabulary, (ids,)), torch.randn(vocabulary, width).to(DTYPES[dtype])],
                     bytes=2 * ids * width * DTYPES[dtype].itemsize,
                     backward=(ids + vocabulary) / (2 * ids))  # fmt: skip
