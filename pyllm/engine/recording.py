"""Recording a step of a model, so that it can be replayed without Python.

While a step is recorded nothing is computed: pyllm's operations are appended to a Program, torch's views and
allocations happen, its copies and plain arithmetic become `ops.elementwise`, and any other torch operation is an error
that names it. So a recording that fails has changed nothing, and the model runs unrecorded.

A model can be recorded if what changes from step to step lies in memory that stays: ids, and a state that advances in
place. Python's own values, shapes among them, are recorded as they are, and so are parameters: small ones are packed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pyllm import _C, ops
from pyllm.ops.elementwise import common_shape

aten = torch.ops.aten


class NotRecordable(RuntimeError):
    """A step that does what cannot be replayed; the message says what."""


class Memory:
    """Places for what recordings allocate. Those that share it have theirs in the same ones: for steps of which only
    one runs at a time, and whose results are read before another does."""

    def __init__(self) -> None:
        self.places: list[Tensor] = []  # uint8

    @property
    def nbytes(self) -> int:
        return sum(place.nbytes for place in self.places)


class Recording(TorchDispatchMode):
    """`with Recording() as program:` records what runs within to a `_C.Program`.

    What is allocated lies in `memory`, its own if there is none: where nothing lies that the step still refers to, so
    that layers share what they need for themselves.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing that is compiled runs in here; to be skipped would load the compiler at once, 50 MB of it."""
        return False

    def __init__(self, memory: Memory | None = None) -> None:
        super().__init__()
        self.program, self.memory = _C.Program(), memory or Memory()
        self.users: dict[int, StorageWeakRef] = {}  # of places: the last that this recording put there
        self.kept: set[int] = set()  # places, by address, that the program keeps

    def __enter__(self) -> Any:
        if torch.is_grad_enabled() or ops.REFERENCE:
            raise NotRecordable("steps are recorded of compiled operations alone, and without gradients")
        super().__enter__()
        self.program.record(True)
        return self.program

    def __exit__(self, *error: Any) -> None:
        self.program.record(False)
        super().__exit__(*error)
        if self.program.unfit and not any(error):
            raise NotRecordable(f"{self.program.unfit} cannot be recorded")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in AS_THEY_ARE:
            return func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            return self._placed(func(*args, **(kwargs or {})))
        if func in RECORDED:
            return RECORDED[func](*args, **(kwargs or {}))
        if func is aten._local_scalar_dense.default:
            raise NotRecordable("a step must not read a tensor's value into Python (item, int, bool, tolist)")
        raise NotRecordable(f"torch's {func.name().removeprefix('aten::')} cannot be recorded: use an operation of "
                            "pyllm.ops in its place")  # fmt: skip

    def _placed(self, t: Tensor) -> Tensor:
        """A tensor like this one, in the smallest place that is free and large enough, or in one that is made so."""
        size, places = t.untyped_storage().nbytes(), self.memory.places
        if size == 0:
            return t
        free = [i for i in range(len(places)) if i not in self.users or self.users[i].expired()]
        at = min((i for i in free if places[i].nbytes >= size), key=lambda i: places[i].nbytes, default=-1)
        if at < 0:
            at = max(free, key=lambda i: places[i].nbytes, default=len(places))
            places[at : at + 1] = [torch.empty(size, dtype=torch.uint8)]
        if places[at].data_ptr() not in self.kept:
            self.kept.add(places[at].data_ptr())
            _C.keep_memory(places[at])
        # A storage of its own, which lives as long as somebody refers to it: the program keeps the place alone.
        own = torch.from_numpy(places[at].numpy()[:size]).view(t.dtype).as_strided(t.size(), t.stride())
        self.users[at] = StorageWeakRef(own.untyped_storage())
        if _C.row_scopes():
            _C.mark_rows(own)
        return own


AS_THEY_ARE = {
    aten.alias.default, aten.as_strided.default, aten.detach.default, aten.expand.default, aten.permute.default,
    aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.t.default, aten.transpose.int, aten.unbind.int, aten.unsqueeze.default,
    aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default,
}  # fmt: skip
ALLOCATIONS = {
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default,
}  # fmt: skip


def _operand(x: Tensor | float, like: Tensor) -> Tensor:
    if isinstance(x, Tensor):
        return x
    with torch.utils._python_dispatch._disable_current_modes():
        return torch.tensor(x, dtype=torch.int64 if like.dtype == torch.int64 else torch.float32)


def _binary(kind: str, a: Tensor, b: Tensor | float, *, alpha: float = 1, out: Tensor | None = None) -> Tensor:
    if alpha != 1:
        raise NotRecordable(f"{kind} with alpha={alpha} cannot be recorded")
    dtype = torch.result_type(a, b)
    numbers = all(d in (torch.float32, torch.bfloat16, torch.float16) for d in (a.dtype, dtype))
    if not numbers and not (a.dtype == dtype == torch.int64 and kind != "divide"):
        raise NotRecordable(f"{kind} of {a.dtype} to {dtype} cannot be recorded")
    y = _operand(b, a)
    if out is None:
        out = torch.empty(common_shape(a, y), dtype=dtype)
    return ops.elementwise(kind, a, y, out=out)


def _in_place(kind: str, a: Tensor, b: Tensor | float, **options: Any) -> Tensor:
    return _binary(kind, a, b, **options, out=a)


def _copy(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    floating = to.is_floating_point() and source.is_floating_point()
    if to.dtype != source.dtype and not (floating and torch.float64 not in (to.dtype, source.dtype)):
        raise NotRecordable(f"a copy from {source.dtype} to {to.dtype} cannot be recorded")
    return ops.elementwise("copy", source, out=to)


def _clone(x: Tensor, *, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    return _copy(torch.empty_like(x, memory_format=memory_format), x)


def _to_copy(x: Tensor, *, dtype: torch.dtype | None = None, layout=None, device=None, pin_memory=None,
             non_blocking=False, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:  # fmt: skip
    return _copy(torch.empty_like(x, dtype=dtype or x.dtype, memory_format=memory_format), x)


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    out = torch.empty(shape, dtype=functools.reduce(torch.promote_types, (t.dtype for t in tensors)))
    for part, t in zip(out.split([t.shape[dim] for t in tensors], dim), tensors, strict=True):
        _copy(part, t)
    return out


def _clamp(x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    if x.dtype != torch.int64:
        raise NotRecordable(f"clamp of {x.dtype} cannot be recorded")
    for kind, bound in (("maximum", min), ("minimum", max)):
        if bound is not None:
            x = ops.elementwise(kind, x, _operand(bound, x))
    return x


def _constant(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What makes a new tensor with the same values at each step: a copy, as the step may write to it."""
    return lambda *args, **kwargs: _clone(make(*args, **kwargs))


RECORDED: dict[Any, Callable[..., Tensor]] = {
    aten.add.Tensor: functools.partial(_binary, "add"),
    aten.add_.Tensor: functools.partial(_in_place, "add"),
    aten.cat.default: _cat,
    aten.clone.default: _clone,
    aten.copy_.default: _copy,
    aten.div.Tensor: functools.partial(_binary, "divide"),
    aten.mul.Tensor: functools.partial(_binary, "multiply"),
    aten.mul_.Tensor: functools.partial(_in_place, "multiply"),
    aten.clamp.default: _clamp,
    aten.neg.default: lambda x: _binary("multiply", x, -1),
    aten.relu.default: lambda x: ops.elementwise("relu", x),
    aten.stack.default: lambda tensors, dim=0: _cat([t.unsqueeze(dim) for t in tensors], dim),
    aten.sub.Tensor: functools.partial(_binary, "subtract"),
    aten._to_copy.default: _to_copy,
} | {make: _constant(make) for make in (
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.full.default, aten.lift_fresh.default,
    aten.new_full.default, aten.new_ones.default, aten.new_zeros.default, aten.ones.default, aten.scalar_tensor.default,
    aten.zeros.default, aten.zeros_like.default,
)}  # fmt: skip
