"""A step of AdamW over all parameters of a model. It must read parameters, gradients and both moments, and write all
but the gradients; clipping these first reads them once more.

torch's column is its fused AdamW after its own clipping, which writes the clipped gradients back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyllm.benchmarks.timing import Case, Providers
from pyllm.training.optimizer import AdamW, clip_scale, gradient_norm

OPS = ("adamw",)
SIZES = {  # (layers, width, vocabulary): of a decoder's shapes
    "tiny": [(1, 8, 11)],
    "small": [(2, 128, 512)],
    "usual": [(6, 288, 32_000)],
    "full": [(2, 128, 512), (6, 288, 32_000), (12, 768, 50_257)],
}


def cases(sizes: str) -> Iterator[Case]:
    for size in SIZES[sizes]:
        for clip in (None, 1.0):
            yield _step(size, clip)


def _shapes(layers: int, width: int, vocabulary: int) -> list[tuple[int, ...]]:
    block = [(width,), (3 * width, width), (width, width), (width,), (4 * width, width), (width, 4 * width)]
    return [(vocabulary, width), *block * layers, (width,)]


def _step(size: tuple[int, int, int], clip: float | None) -> Case:
    shapes = _shapes(*size)
    count = sum(torch.Size(shape).numel() for shape in shapes)

    def setup() -> Providers:
        values = [(torch.randn(shape), torch.randn(shape)) for shape in shapes]
        return {"pyllm": _ours(_leaves(values), clip), "torch": _torchs(_leaves(values), clip)}

    name = f"{count / 1e6:.1f}M parameters in {len(shapes)} tensors{', clipped' if clip else ''} fp32"
    return Case("adamw", name, setup, bytes=count * (32 if clip else 28))


def _leaves(values: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    leaves = [value.clone().requires_grad_() for value, _ in values]
    for leaf, (_, gradient) in zip(leaves, values, strict=True):
        leaf.grad = gradient.clone()
    return leaves


def _ours(leaves: list[Tensor], clip: float | None) -> Callable[[], list[Tensor]]:
    optimizer = AdamW(leaves)

    def step() -> list[Tensor]:
        optimizer.step(scale=1.0 if clip is None else clip_scale(gradient_norm(leaves), clip))
        return leaves

    return step


def _torchs(leaves: list[Tensor], clip: float | None) -> Callable[[], list[Tensor]]:
    optimizer = torch.optim.AdamW(leaves, fused=True)

    def step() -> list[Tensor]:
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(leaves, clip)
        optimizer.step()
        return leaves

    return step
