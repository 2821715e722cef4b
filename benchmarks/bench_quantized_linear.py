"""Quantised linear beside fp32 torch: what a user of either would choose between. The weight's bytes cross the memory
once, which is the limit for few rows. An embedding reads rows of the same packed weight. Packing reads the weight and
writes it, as torch's copy of its bytes does."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from pyllm import ops
from pyllm.benchmarks.timing import Case, Providers

OPS = ("pack_quantized", "quantized_embedding", "quantized_linear")
SIZES = {  # (rows, in, out)
    "tiny": [(3, 32, 7)],
    "small": [],
    "usual": [(1, 896, 4864), (512, 896, 4864)],
    "full": [(1, 896, 4864), (1, 896, 151936), (8, 896, 4864), (32, 896, 4864), (512, 896, 4864)],
}
LARGER = 128  # elements of a group, with which many rows take less time


def cases(sizes: str) -> Iterator[Case]:
    for bits in (8, 4):
        for m, k, n in SIZES[sizes]:
            yield _linear(m, k, n, bits)
            yield _linear(m, k, n, bits, LARGER)
        for k, n in dict.fromkeys((k, n) for _, k, n in SIZES[sizes]):
            yield _pack(k, n, bits)
            yield _embedding(k, n, bits)


def _weight(k: int, n: int, bits: int, group: int = 32) -> ops.QuantizedWeight:
    values = torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8)
    scales = torch.rand(n, k // 32) if group == 32 else torch.full((n, k // 32), 0.5)
    return ops.QuantizedWeight(values, scales.half(), None, bits, (n, k), group)


def _linear(m: int, k: int, n: int, bits: int, group: int = 32) -> Case:
    def setup() -> Providers:
        x, weight = torch.randn(m, k), _weight(k, n, bits, group)
        packed, dense = ops.pack_quantized(weight), weight.dequantize()
        return {"pyllm": lambda: ops.quantized_linear(x, packed), "torch": lambda: F.linear(x, dense)}

    groups = "" if group == 32 else f" in groups of {group}"
    return Case("quantized_linear", f"{m} x {k} -> {n}, {bits} bits{groups} fp32", setup, flops=2 * m * n * k,
                bytes=_bytes(k, n, bits) + 4 * m * (k + n))  # fmt: skip


def _pack(k: int, n: int, bits: int) -> Case:
    def setup() -> Providers:
        weight = _weight(k, n, bits)
        return {"pyllm": lambda: ops.pack_quantized(weight),
                "torch": lambda: (weight.values.clone(), weight.scales.clone())}  # fmt: skip

    return Case("pack_quantized", f"{k} -> {n}, {bits} bits fp32", setup, bytes=2 * _bytes(k, n, bits))


def _embedding(k: int, n: int, bits: int) -> Case:
    def setup() -> Providers:
        ids, weight = torch.randint(n, (512,)), _weight(k, n, bits)
        packed, dense = ops.pack_quantized(weight), weight.dequantize()
        return {"pyllm": lambda: ops.quantized_embedding(ids, packed), "torch": lambda: F.embedding(ids, dense)}

    return Case("quantized_embedding", f"512 of {n} x {k}, {bits} bits fp32", setup,
                bytes=_bytes(k, 512, bits) + 4 * 512 * k)  # fmt: skip


def _bytes(k: int, n: int, bits: int) -> int:
    return n * k * bits // 8 + 2 * n * k // 32
