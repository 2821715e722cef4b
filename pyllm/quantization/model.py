from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor

from pyllm import nn
from pyllm.models import Model
from pyllm.ops import PackedQuantizedWeight
from pyllm.ops.quantized_linear import LARGER_GROUPS
from pyllm.quantization.compensation import quantize_compensated
from pyllm.quantization.weights import quantize_weight

FORMATS = {"int8": (8, False), "int4": (4, False), "int4-min": (4, True)}  # bits, and whether groups have minimums
_HEAD = (8, False)  # at least: no later layer makes up for what the head loses
_MOMENTS = 1 << 27  # elements of inputs' second moments held at once


@dataclass(frozen=True)
class Quantization:
    """What `quantize` did: the layers by name, and the bytes of the model's weights before and after."""

    layers: tuple[str, ...]
    bytes_before: int
    bytes_after: int


def quantize(model: Model, weights: str, *, group: int = 32, skip: Sequence[str] = (),
             calibration: Iterable[Tensor] | None = None,
             progress: Callable[[int, int], None] | None = None) -> Quantization:  # fmt: skip
    """Quantises the linear layers of a model in place: they run on whole numbers from now on, and no longer train.

    The head gets 8 bits in every format. Embeddings that share its weight go on sharing it; others, and recurrent
    layers, stay as they are.

    Args:
        weights: "int8", "int4", or "int4-min", whose groups have a smallest element of their own besides a scale:
            nearer, for half a bit more a weight.
        group: elements along the input that share a scale: 32 or, for "int8", 64, 128 or 256, with which long prompts
            take less time on processors with tile registers (AMX), for a little more error.
        skip: patterns ("head", "*.down") of the names of layers to leave alone.
        calibration: batches of ids (B, T). With them, what rounding a column of a weight loses is made up for by the
            columns that follow, on the inputs that these bring; layers early in the model are rounded first.
        progress: called with the number of layers done, and of all.

    Raises:
        ValueError: an unknown format, a group that it does not have, a model without a `pyllm.nn.Linear` that is not
            quantised yet, a pattern that is no layer's, or weights that are not finite; the model is as it was, or, for
            the last, quantised in part.
    """
    if weights not in FORMATS:
        raise ValueError(f"[quantize] weights must be one of {', '.join(FORMATS)}, but got {weights!r}")
    if group != 32 and (weights != "int8" or group not in LARGER_GROUPS):
        raise ValueError(f"[quantize] group must be 32 or, for int8, 64, 128 or 256, but got {group} for {weights}")
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.packed is None}
    if not found:
        raise ValueError(
            "[quantize] the model must have layers of pyllm.nn.Linear that are not quantised yet, but has none"
        )
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ValueError(
                f"[quantize] skip must name layers ({', '.join(list(found)[:4])}, ...), but got {pattern!r}"
            )
    layers = {n: m for n, m in found.items() if not any(fnmatchcase(n, pattern) for pattern in skip)}
    before, done = model.num_bytes(), 0
    batches = None if calibration is None else list(calibration)
    for names in _portions(layers) if batches else [list(layers)]:
        moments = _moments(model, {n: layers[n] for n in names}, batches) if batches else {}
        for name in names:
            layer = layers[name]
            bits, minimums = max(FORMATS[weights], _HEAD) if name.split(".")[0] == "head" else FORMATS[weights]
            if name in moments:
                quantized = quantize_compensated(layer.weight, moments.pop(name), bits, minimums=minimums, group=group)
            else:
                quantized = quantize_weight(layer.weight, bits, minimums=minimums, group=group)
            sharing = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is layer.weight]
            layer.quantize_(quantized)
            for embedding in sharing:
                embedding.quantize_(cast(PackedQuantizedWeight, layer.packed))
            done += 1
            if progress is not None:
                progress(done, len(layers))
    return Quantization(tuple(layers), before, model.num_bytes())


def _portions(layers: dict[str, nn.Linear]) -> list[list[str]]:
    portions: list[list[str]] = [[]]
    size = 0
    for name, layer in layers.items():
        size += layer.in_features**2
        if size > _MOMENTS and portions[-1]:
            portions.append([])
            size = layer.in_features**2
        portions[-1].append(name)
    return portions


@torch.no_grad()
def _moments(model: Model, layers: dict[str, nn.Linear], batches: list[Tensor]) -> dict[str, Tensor]:
    """The sum of x x^T over the inputs x that come to each layer; those to which nothing comes are left out."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()
            sums[name] = sums.get(name, 0.0) + x.T @ x

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        for ids in batches:
            model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return sums
