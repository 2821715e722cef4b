"""Cross-entropy. Forward must read the logits; backward must read them and write their gradient. The linear form must
multiply three times: the logits, and the gradients of x and weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from pyllm import ops, reference
from pyllm.benchmarks.timing import Case, modes

OPS = ("cross_entropy", "linear_cross_entropy")
SIZES = [(2048, 100), (2048, 512), (2048, 10000), (1024, 32000), (512, 151936)]
LINEAR_SIZES = [(2048, 256, 512), (2048, 256, 10000), (1024, 256, 32000), (512, 256, 151936)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases() -> Iterator[Case]:
    both = ("forward", "forward+backward")
    for dtype_name, dtype in DTYPES.items():
        for rows, classes in SIZES:
            logits, targets = torch.randn(rows, classes).to(dtype), torch.randint(classes, (rows,))
            providers = {"pyllm": ops.cross_entropy, "torch": F.cross_entropy, "reference": reference.cross_entropy}
            yield from modes("cross_entropy", f"{rows} x {classes} {dtype_name}", providers, (logits, targets),
                             bytes=logits.nbytes, backward=2, measure=both)  # fmt: skip
        for rows, width, classes in LINEAR_SIZES:
            x, weight = torch.randn(rows, width).to(dtype), torch.randn(classes, width).div(width**0.5).to(dtype)
            targets = torch.randint(classes, (rows,))
            providers = {
                "pyllm": ops.linear_cross_entropy,
                "torch": lambda x, w, t: F.cross_entropy(F.linear(x, w), t),
            }
            name, flops = f"{rows} x {width} -> {classes} {dtype_name}", 2 * rows * width * classes
            yield from modes("linear_cross_entropy", name, providers, (x, weight, targets), flops=flops, backward=2,
                             measure=both)  # fmt: skip
