from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from pyllm import nn
from pyllm.models import Model
from pyllm.ops.quantized_linear import LARGER_GROUPS, PIECE
from pyllm.quantization.compensation import quantize_compensated
from pyllm.quantization.weights import quantize_weight

FORMATS = {"int8": (8, False), "int4": (4, False), "int4-min": (4, True)}  # bits, and whether groups have minimums
_HEAD = (8, False)  # at least: no later layer makes up for what the head loses
_MOMENTS = 1 << 27  # elements of inputs' second moments held at once


@dataclass(frozen=True)
class Quantization:
    """What `quantize` did: the layers, or weights of recurrent ones, by name; the bytes of the model's weights before
    and after."""

    layers: tuple[str, ...]
    bytes_before: int
    bytes_after: int


def quantize(model: Model, weights: str, *, group: int = 32, skip: Sequence[str] = (),
             calibration: Iterable[Tensor] | None = None,
             progress: Callable[[int, int], None] | None = None) -> Quantization:  # fmt: skip
    """Quantises the linear and recurrent layers of a model in place: their weights are whole numbers from now on, and
    no longer train.

    The head gets 8 bits in every format. Embeddings that share its weight go on sharing it; others stay as they are.

    Args:
        weights: "int8", "int4", or "int4-min", whose groups have a smallest element of their own besides a scale:
            nearer, for half a bit more a weight.
        group: elements along the input that share a scale: 32, or 64, 128 or 256, with which long prompts take less
            time on processors with tile registers (AMX), for a little more error. Of 4 bits, 32 elements still have a
            scale of their own then, a multiple of one that the group shares.
        skip: patterns ("head", "*.down", "rnn.weight_hh*") of the names of layers to leave alone, or of single weights
            of recurrent ones.
        calibration: batches of ids (B, T). With them, what rounding a column of a weight loses is made up for by the
            columns that follow, on the inputs that these bring; layers early in the model are rounded first.
        progress: called with the number of weights done, and of all.

    Raises:
        ValueError: an unknown format or group, a model without a layer of `pyllm.nn` that can be
            quantised and is not yet, a pattern that is no layer's, or weights that are not finite; the model is as it
            was, or, for the last, quantised in part.
    """
    if weights not in FORMATS:
        raise ValueError(f"[quantize] weights must be one of {', '.join(FORMATS)}, but got {weights!r}")
    if group not in (PIECE, *LARGER_GROUPS):
        raise ValueError(f"[quantize] group must be 32, 64, 128 or 256, but got {group}")
    found = {weight.name: weight for weight in _weights(model)}
    if not found:
        raise ValueError("[quantize] the model must have linear or recurrent layers of pyllm.nn that are not quantised "
                         "yet, but has none")  # fmt: skip
    for pattern in skip:
        if not any(weight.named(pattern) for weight in found.values()):
            raise ValueError(
                f"[quantize] skip must name layers ({', '.join(list(found)[:4])}, ...), but got {pattern!r}"
            )
    chosen = {name: weight for name, weight in found.items() if not any(map(weight.named, skip))}
    before, done = model.num_bytes(), 0
    batches = None if calibration is None else list(calibration)
    for names in _portions(chosen) if batches else [list(chosen)]:
        moments = _moments(model, [chosen[name] for name in names], batches) if batches else {}
        for name in names:
            layer, attribute = chosen[name].layer, chosen[name].attribute
            weight = getattr(layer, attribute)
            bits, minimums = max(FORMATS[weights], _HEAD) if name.split(".")[0] == "head" else FORMATS[weights]
            if name in moments:
                quantized = quantize_compensated(weight, moments.pop(name), bits, minimums=minimums, group=group)
            else:
                quantized = quantize_weight(weight, bits, minimums=minimums, group=group)
            sharing = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is weight]
            layer.quantize_(quantized, attribute)
            for embedding in sharing:
                embedding.quantize_(layer.quantized[attribute])
            done += 1
            if progress is not None:
                progress(done, len(chosen))
    return Quantization(tuple(chosen), before, model.num_bytes())


@dataclass(frozen=True)
class _Weight:
    """A weight that can be quantised. Its name is its layer's or, of one of several, the parameter's."""

    name: str
    layer_name: str
    layer: nn.Quantizable
    attribute: str

    def named(self, pattern: str) -> bool:
        return fnmatchcase(self.name, pattern) or fnmatchcase(self.layer_name, pattern)


def _weights(model: Model) -> list[_Weight]:
    """Those that are not quantised yet; embeddings follow the layers that they share one with."""
    return [
        _Weight(name if attribute == "weight" else f"{name}.{attribute}", name, layer, attribute)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Quantizable) and not isinstance(layer, nn.Embedding)
        for attribute in layer.sizes()
        if attribute not in layer.quantized
    ]


def _portions(weights: dict[str, _Weight]) -> list[list[str]]:
    portions: list[list[str]] = [[]]
    size = 0
    for name, weight in weights.items():
        moments = weight.layer.sizes()[weight.attribute][1] ** 2
        size += moments
        if size > _MOMENTS and portions[-1]:
            portions.append([])
            size = moments
        portions[-1].append(name)
    return portions


@torch.no_grad()
def _moments(model: Model, weights: list[_Weight], batches: list[Tensor]) -> dict[str, Tensor]:
    """The sum of x x^T over the inputs x that come to each weight; those to which nothing comes are left out."""
    sums: dict[str, Tensor] = {}
    layers: dict[nn.Quantizable, list[_Weight]] = {}
    for weight in weights:
        layers.setdefault(weight.layer, []).append(weight)

    def watch(layer: nn.Quantizable, inputs: tuple[Any, ...]) -> None:
        found = layer.weight_inputs(*inputs)
        for weight in layers[layer]:
            if weight.attribute in found:
                x = found[weight.attribute].flatten(0, -2).float()
                sums[weight.name] = sums.get(weight.name, 0.0) + x.T @ x

    handles = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        for ids in batches:
            model(ids)
    finally:
        for handle in handles:
            handle.remove()
    return sums
