"""What a family of models is to us: one table. How its config.json makes our model, and where its checkpoints keep what
we keep elsewhere. Nothing that a checkpoint brings is ever run."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pyllm import nn, ops
from pyllm.models import Model
from pyllm.nn.feed_forward import GATED
from pyllm.ops.quantized_linear import pack_pieces

_COLUMNS = 64  # put in another order at a time


class WeightsError(ValueError):
    """Weights that are not those of the model that a config describes, or that a checkpoint cannot hold."""


@dataclass(frozen=True)
class Weight:
    """One of our parameters, and where a Hugging Face checkpoint keeps it.

    name: ours; "{i}" stands for the layer's number, "{e}" for the expert's: "blocks.{i}.attention.qkv.weight".
    parts: theirs, joined along the first dimension.
    transposed: stored (in, out), as by GPT-2's Conv1D.
    by_head: query, key and value rows are stored head by head (all three of the first head, of the second, ...).
    as_row: a vector is stored as (1, n).
    optional: a checkpoint may lack it: it is zeros then.
    gated: whether the row is for feed-forward layers with a gate only, or for those without; None: for both.
    """

    name: str
    parts: tuple[str, ...]
    transposed: bool = False
    by_head: bool = False
    as_row: bool = False
    optional: bool = False
    gated: bool | None = None


@dataclass(frozen=True)
class Family:
    """A row of `FAMILIES`.

    model_type, architectures: config.json's "model_type", and the "architectures" that name a model of this kind.
    config: a Hugging Face config as our constructor's arguments; ValueError for what it lacks or we do not have.
    weights: of all settings; those that a model has no parameter for are not looked for.
    to_config: a model's Hugging Face config.
    ignored: patterns of names in checkpoints that hold nothing that is needed.
    prefix: what checkpoints of the bare model leave off their names.
    older: (pattern, replacement) of parts of names that older checkpoints have in the place of today's.
    complete: adds to a checkpoint's config what only the names of its weights tell.
    """

    model_type: str
    architectures: tuple[str, ...]
    model: type[Model]
    config: Callable[[dict], dict]
    weights: tuple[Weight, ...]
    to_config: Callable[[Any], dict]
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    older: tuple[tuple[str, str], ...] = ()
    complete: Callable[[dict, Collection[str]], dict] | None = None


class Entry(Protocol):
    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class WeightReader(Protocol):
    """Weights of a checkpoint: `entries` needs no data to be read; `read` fills `out`, converting, or a new tensor, and
    of a weight that can be mapped also a contiguous tensor transposed; `map` gives weights, joined along their first
    dimension, where they lie in a file, or None."""

    def entries(self) -> Mapping[str, Entry]: ...

    def read(self, name: str, out: Tensor | None = None) -> Tensor: ...

    def map(self, names: Sequence[str]) -> Tensor | None: ...


class PackedReader(Protocol):
    """Quantised weights of a checkpoint: a layout is as `ops.PackedQuantizedWeight` has it, None where there is none;
    `read_packed` gives a weight, some rows after the other, in a layout that holds its own."""

    def layout(self, name: str) -> tuple[int, int, bool, bool] | None: ...

    def read_packed(self, name: str, layout: tuple[int, int, bool, bool]) -> Iterator[ops.QuantizedWeight]: ...


@dataclass(frozen=True)
class _Place:
    """A parameter of a model, and its parts in a checkpoint with their shapes as stored."""

    name: str
    parameter: Tensor
    weight: Weight
    parts: dict[str, tuple[int, ...]]
    heads: int


def check_config(config: dict, family: Family) -> None:
    """Raises ValueError where a config asks for code of its own, or is not this family's."""
    if "auto_map" in config:
        raise ValueError(
            f"the checkpoint's config.json has an auto_map: it asks to run code of its own ({config['auto_map']!r}). "
            "That is never done. If its weights are those of a family that is known here, remove auto_map and set "
            "model_type to that family"
        )
    if config.get("model_type") != family.model_type:
        raise ValueError(f"model_type must be {family.model_type!r}, but got {config.get('model_type')!r}")
    named = config.get("architectures") or []
    if named and not set(named) & set(family.architectures):
        raise ValueError(f"architectures must name one of {', '.join(family.architectures)}, but got {named!r}")


def load_weights(model: Model, family: Family, reader: WeightReader, *, dtype: torch.dtype | None = None,
                 packed: PackedReader | None = None,
                 progress: Callable[[int, int], None] | None = None) -> None:  # fmt: skip
    """Fills a model's parameters from a checkpoint.

    Args:
        model: one made from `family.config(...)`. Its parameters may be on the meta device, so that nothing was
            allocated for them: they are then made one after the other, as they are read.
        reader: the checkpoint.
        dtype: of the parameters from now on; by default the checkpoint's, for those on the meta device, or their own.
        packed: the same checkpoint, where weights that it has quantised are to stay so in layers that can have them.
        progress: called with the number of elements read so far, and of all.

    Raises:
        WeightsError: weights that are missing, of another shape, or not the model's. All of them are listed, and
            nothing has been allocated, read or changed.
    """
    reader = _Renamed(reader, family.older)
    entries = reader.entries()
    bare = bool(family.prefix) and not any(name.startswith(family.prefix) for name in entries)
    places = _places(model, family, bare)
    zeros = {part for place in places if place.weight.optional for part in place.parts if part not in entries}
    wanted = {name: shape for place in places for name, shape in place.parts.items() if name not in zeros}
    tied = {part for name in _tied_names(model) for part in _parts(model, family, name, bare)[1]}
    wrong = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in entries]
    wrong += [f"wrong shape: {name} must be {shape}, but is {tuple(entries[name].shape)}"
              for name, shape in wanted.items() if name in entries and tuple(entries[name].shape) != shape]  # fmt: skip
    wrong += [f"wrong dtype: {name} must be of a floating dtype, but is {entries[name].dtype}"
              for name in wanted if name in entries and not entries[name].dtype.is_floating_point]  # fmt: skip
    wrong += [f"not the model's: {name} {tuple(entry.shape)}" for name, entry in entries.items()
              if name not in wanted and name not in tied
              and not any(re.fullmatch(p, name) for p in family.ignored)]  # fmt: skip
    if wrong:
        raise WeightsError(
            f"the checkpoint does not hold the weights of {family.model_type!r}:\n  " + "\n  ".join(wrong)
        )

    done, total = 0, sum(place.parameter.numel() for place in places)
    space = torch.empty(max((_space(place) for place in places), default=0), dtype=torch.float64)
    owners: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    for place in places:
        old, new, first = place.parameter, place.parameter, next(iter(place.parts))
        stored = next(iter(wanted)) if first in zeros else first
        kind = dtype or (entries[stored].dtype if old.is_meta else old.dtype)
        layout = None if packed is None or zeros & place.parts.keys() else _layout(place, owners[id(old)], packed)
        if packed is not None and layout is not None:
            _quantize(place, owners[id(old)], packed, layout, kind)
            done += old.numel()
            if progress is not None:
                progress(done, total)
            continue
        found = None
        if old.is_meta and not zeros & place.parts.keys() and {entries[part].dtype for part in place.parts} == {kind}:
            found = _as_stored(reader, place)
        if found is not None:
            new = torch.nn.Parameter(found, old.requires_grad)
        else:
            if old.is_meta or old.dtype != kind:
                new = torch.nn.Parameter(torch.empty(old.shape, dtype=kind), old.requires_grad)
            if first in zeros:
                new.detach().zero_()
            else:
                _read(reader, place, new.detach(), space)
        for module, name in owners[id(old)]:
            setattr(module, name, new)
            if not new.is_contiguous():
                cast(nn.Linear, module).transposed = True
        done += new.numel()
        if progress is not None:
            progress(done, total)


def _layout(place: _Place, owners: list[tuple[torch.nn.Module, str]],
            packed: PackedReader) -> tuple[int, int, bool, bool] | None:  # fmt: skip
    """The least layout that holds all parts of a weight as they are, if they can stay quantised."""
    weight = place.weight
    if weight.transposed or weight.by_head or weight.as_row or place.parameter.dim() != 2:
        return None
    if not all(isinstance(module, nn.Quantizable) and name == "weight" for module, name in owners):
        return None
    layouts = [packed.layout(name) for name in place.parts]
    if any(layout is None for layout in layouts):
        return None
    bits, groups, halves, minimums = zip(*cast(list[tuple[int, int, bool, bool]], layouts), strict=True)
    alike = len(set(minimums)) == 1  # a minimum made from a scale may be more than a float16 holds
    return max(bits), min(groups), all(halves) and alike, any(minimums)


def _quantize(place: _Place, owners: list[tuple[torch.nn.Module, str]], packed: PackedReader,
              layout: tuple[int, int, bool, bool], dtype: torch.dtype) -> None:  # fmt: skip
    pieces = (piece for name in place.parts for piece in packed.read_packed(name, layout))
    weight = pack_pieces(pieces, place.parameter.shape[0])
    for module, _ in owners:
        cast(nn.Quantizable, module).quantize_(weight)
        if isinstance(module, nn.Embedding):
            module.to(dtype)


def export_weights(model: Model, family: Family) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a model's parameters as a Hugging Face checkpoint has them: views where that is possible.

    Raises:
        WeightsError: a layer of the model is quantised.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Quantizable) and module.quantized:
            raise WeightsError(f"{name} is quantised, which no checkpoint for others can hold: export the model that "
                               "was not, or keep this one with pyllm.save")  # fmt: skip
    for place in _places(model, family, model.head is None):
        tensor = place.parameter.detach()
        if place.weight.by_head:
            tensor = _rows(tensor, (3, place.heads)).transpose(0, 1).flatten(0, 2)
        if place.weight.transposed:
            tensor = tensor.t()
        if place.weight.as_row:
            tensor = tensor[None]
        at = 0
        for name, shape in place.parts.items():
            yield name, tensor if len(place.parts) == 1 else tensor[at : at + shape[0]]
            at += shape[0]


class _Renamed:
    """Weights under the names of today; where there is one of these, one of an older name is not looked at."""

    def __init__(self, reader: WeightReader, older: tuple[tuple[str, str], ...]):
        self._reader, self._names = reader, {name: name for name in reader.entries()}
        for pattern, replacement in older:
            for name in [n for n in self._names if re.search(pattern, n)]:
                self._names.setdefault(re.sub(pattern, replacement, name), self._names.pop(name))

    def entries(self) -> Mapping[str, Entry]:
        stored = self._reader.entries()
        return {name: stored[old] for name, old in self._names.items()}

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        return self._reader.read(self._names[name], out)

    def map(self, names: Sequence[str]) -> Tensor | None:
        return self._reader.map([self._names[name] for name in names])


def _as_stored(reader: WeightReader, place: _Place) -> Tensor | None:
    """A parameter that is what a checkpoint holds as it is, in one piece or, mapped, in some that follow each other.

    Mapped, it may be what is stored transposed, where that costs a product nothing: in float32. With 16 bits, the
    processor wants neighbours along the dimension that is summed over.
    """
    weight, names = place.weight, list(place.parts)
    if weight.by_head:
        return None
    found = reader.map(names)
    if weight.transposed:
        return None if found is None or found.dtype != torch.float32 else found.t()
    if found is None and len(names) == 1:
        found = reader.read(names[0])
    return None if found is None else found.view(place.parameter.shape)


def _space(place: _Place) -> int:
    """How many values are to be held to put a parameter's into our layout."""
    if place.weight.transposed:
        return place.parameter.numel()
    return min(place.parameter.numel(), len(place.parameter) * _COLUMNS) if place.weight.by_head else 0


def _read(reader: WeightReader, place: _Place, out: Tensor, space: Tensor) -> None:
    """`space` is the same for all, as memory that was given back may not be used again."""
    space = space.view(out.dtype)
    if place.weight.transposed:
        [(name, shape)] = place.parts.items()
        if reader.map([name]) is not None:
            reader.read(name, out.t())
        else:
            out.copy_(reader.read(name, space[: out.numel()].view(shape)).t())
        return
    at = 0
    for name, shape in place.parts.items():
        reader.read(name, out[None] if place.weight.as_row else out[at : at + shape[0]])
        at += shape[0]
    if place.weight.by_head:
        for part in out.view(len(out), -1).split(_COLUMNS, 1):
            stored = space[: part.numel()].view(part.shape).copy_(part)
            _rows(part, (3, place.heads)).copy_(_rows(stored, (place.heads, 3)).transpose(0, 1))


def _rows(tensor: Tensor, groups: tuple[int, int]) -> Tensor:
    return tensor.view(*groups, -1, *tensor.shape[1:])


def _places(model: Model, family: Family, bare: bool) -> list[_Place]:
    places = []
    for name, parameter in model.named_parameters():
        weight, names = _parts(model, family, name, bare)
        owner = model.get_submodule(name.rpartition(".")[0])
        shape = tuple(parameter.shape)
        if len(names) == 1:
            shapes = [shape[::-1] if weight.transposed else (1, *shape) if weight.as_row else shape]
        else:
            rows = getattr(owner, "parts", (shape[0] // len(names),) * len(names))
            shapes = [(n, *shape[1:]) for n in rows]
        heads = model.config["num_heads"] if weight.by_head else 0
        places.append(_Place(name, parameter, weight, dict(zip(names, shapes, strict=True)), heads))
    return places


def _tied_names(model: Model) -> list[str]:
    once = dict(model.named_parameters())
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in once]


def _parts(model: Model, family: Family, name: str, bare: bool) -> tuple[Weight, list[str]]:
    for weight in family.weights:
        if weight.gated is not None and weight.gated != (model.config["activation"] in GATED):
            continue
        if match := _pattern(weight.name).fullmatch(name):
            names = [part.format(**match.groupdict()) for part in weight.parts]
            return weight, [n.removeprefix(family.prefix) for n in names] if bare else names
    raise KeyError(f"the table of {family.model_type!r} has no row for the parameter {name}")


@functools.cache
def _pattern(name: str) -> re.Pattern:
    pattern = re.escape(name)
    for key in ("i", "e"):
        pattern = pattern.replace(re.escape(f"{{{key}}}"), f"(?P<{key}>[0-9]+)")
    return re.compile(pattern)
