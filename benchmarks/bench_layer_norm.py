"""Layer norm and rms norm. Forward must read x and write y; backward must read dy and x and write dx."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from pyllm import ops, reference
from pyllm.benchmarks.timing import Case, modes

OPS = ("layer_norm", "rms_norm")
SIZES = [(1, 288), (1, 896), (1, 4096), (512, 288), (512, 896), (4096, 896), (4096, 4096)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases() -> Iterator[Case]:
    for dtype_name, dtype in DTYPES.items():
        for rows, width in SIZES:
            x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((rows, width), width, width))
            name, moved = f"{rows} x {width} {dtype_name}", 2 * x.nbytes
            layer_norm: dict[str, Callable] = {
                "pyllm": ops.layer_norm,
                "torch": lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b),
                "reference": reference.layer_norm,
            }
            rms_norm: dict[str, Callable] = {
                "pyllm": ops.rms_norm,
                "torch": lambda x, w: F.rms_norm(x, (x.shape[-1],), w, 1e-6),
                "reference": reference.rms_norm,
            }
            yield from modes("layer_norm", name, layer_norm, (x, weight, bias), bytes=moved, backward=1.5)
            yield from modes("rms_norm", name, rms_norm, (x, weight), bytes=moved, backward=1.5)
