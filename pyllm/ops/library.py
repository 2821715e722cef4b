"""The operations as torch.library's (`torch.ops.pyllm.linear`), so that torch.compile and torch.export see them.

Eager calls stay plain functions. `register` puts a function in front of each that, while a graph is traced, calls the
registered operation in its place. A registered operation's schema comes from the function's own annotations; it takes
every argument in order, optional and either-or tensors as lists, a number where a tensor would do as one of no
dimension, and returns a list. Its gradient is an operation too, which runs the function again with gradients on: a
compiled backward pass computes the forward pass twice.

What is written by hand is one line an operation, the shapes that it returns.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from pyllm.ops.linear import PackedLinear
from pyllm.ops.paging import head_size
from pyllm.ops.quantized_linear import PackedQuantizedWeight

_LIBRARY = torch.library.Library("pyllm", "DEF")

_KINDS = {  # an annotation -> a schema's type, and what Python may give in its place
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]",
    tuple[Tensor, Tensor]: "Tensor[]",
    tuple[Tensor, Tensor] | None: "Tensor[]?",
    Tensor | tuple[Tensor, Tensor] | None: "Tensor[]? or one",
    Tensor | PackedLinear: "Tensor packed",  # a packed weight in a tensor's place is for eager calls
    Tensor | PackedQuantizedWeight: "Tensor packed",
    Sequence[Tensor | PackedQuantizedWeight]: "Tensor[] packed",
    PackedQuantizedWeight: "packed",  # two arguments of a schema: its panels, and numbers
    torch.dtype: "ScalarType",
    float | Tensor: "Tensor or float",
    int | Tensor: "Tensor or int",
    float: "float",
    float | None: "float?",
    int: "int",
    int | None: "int?",
    bool: "bool",
    str: "str",
}


_PACKED = (PackedLinear, PackedQuantizedWeight)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)  # as in csrc/dtype.h


def _norm(a):
    return [_like(a.x)] if a.residual is None else [_like(a.x), _like(a.x)]


def _loss(a, like):
    return [like.new_empty(a.targets.shape if a.reduction == "none" else (), dtype=torch.float32)]


def _attention(a):
    keys = a.k.shape[1] * (1 if a.page_table is None else a.page_table.shape[1])
    weights = a.q.new_empty(a.q.shape[0], a.q.shape[2], a.q.shape[1], keys)
    out = a.q.new_empty(*a.q.shape[:3], head_size(a.v))
    return [out, weights] if a.return_weights else [out]


def _recurrent(a, states=1):
    directions, hidden, (batch, time) = 2 if a.bidirectional else 1, a.params[1].shape[1], a.x.shape[:2]
    if not a.batch_first:
        batch, time = time, batch
    sizes = (batch, time) if a.batch_first else (time, batch)
    last = (a.num_layers * directions, batch, hidden)
    return [a.x.new_empty(*sizes, directions * hidden), *(a.x.new_empty(last) for _ in range(states))]


def _route(a):
    rows, experts = a.logits.shape
    whole = (a.logits.new_empty(n, dtype=torch.int64) for n in (rows * a.active, rows * a.active, experts + 1))
    return [a.logits.new_empty(rows, a.active, dtype=torch.float32), *whole]


def _wkv(a):
    batch, _, heads, dim = a.r.shape
    return [_like(a.r), a.r.new_empty(batch, heads, dim, dim, dtype=torch.float32)]


def _like(x):
    return x.new_empty(x.shape)


SHAPES: dict[str, Callable] = {
    "attention": _attention,
    "cross_entropy": lambda a: _loss(a, a.logits),
    "embedding": lambda a: [a.weight.new_empty(*a.ids.shape, a.weight.shape[1])],
    "geglu": lambda a: [_like(a.gate)],
    "gelu": lambda a: [_like(a.x)],
    "gru": _recurrent,
    "gru_cell": lambda a: [_like(a.h)],
    "layer_norm": _norm,
    "linear": lambda a: [a.x.new_empty(*a.x.shape[:-1], a.weight.shape[0])],
    "linear_cross_entropy": lambda a: _loss(a, a.x),
    "lstm": lambda a: _recurrent(a, states=2),
    "lstm_cell": lambda a: [_like(a.state[0]), _like(a.state[1])],
    "next_positions": lambda a: [a.lengths.new_empty(*a.lengths.shape, a.count), _like(a.lengths)],
    "quantized_embedding": lambda a: [a.weight.panels.new_empty(*a.ids.shape, a.weight.shape[1], dtype=a.dtype)],
    "quantized_linear": lambda a: [a.x.new_empty(*a.x.shape[:-1], a.weight.shape[0])],
    "relu_squared": lambda a: [_like(a.x)],
    "rms_norm": _norm,
    "rnn": _recurrent,
    "rnn_cell": lambda a: [_like(a.h)],
    "rope": lambda a: [_like(a.x)],
    "route": _route,
    "sample": lambda a: [a.logits.new_empty(a.logits.shape[0], dtype=t) for t in
                         (torch.int64, torch.float32, torch.float32)],
    "sigmoid": lambda a: [_like(a.x)],
    "silu": lambda a: [_like(a.x)],
    "swiglu": lambda a: [_like(a.gate)],
    "tanh": lambda a: [_like(a.x)],
    "wkv": _wkv,
}  # fmt: skip


EAGER = {"adamw", "elementwise", "write_pages"}  # have no schema here: they break a traced graph in two


def register(functions: dict[str, Callable]) -> dict[str, Callable]:
    """Registers each function that has an entry in SHAPES under its name; returns those to call in their place."""
    registered = {name: _front(name, f, *_register(name, f)) for name, f in functions.items() if name in SHAPES}
    # torch.compiler.disable would load the compiler at once, a second and 85 MB of it
    eager = {name: _front(name, f, _disable_dynamo(f), _kinds(f)) for name, f in functions.items() if name in EAGER}
    return registered | eager


def _kinds(f: Callable) -> dict[str, str]:
    hints = typing.get_type_hints(f)
    return {key: _KINDS[hints[key]] for key in inspect.signature(f).parameters}


def _front(name: str, eager: Callable, traced: Callable, kinds: dict[str, str]) -> Callable:
    @functools.wraps(eager)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling():
            return traced(*args, **kwargs)
        try:
            return eager(*args, **kwargs)
        except Exception as error:
            if not str(error).startswith("["):
                _explain(name, kinds, args, kwargs, error)
            raise

    return call


def _explain(name: str, kinds: dict[str, str], args: tuple, kwargs: dict, error: Exception) -> None:
    """Where an argument is not a tensor that any kernel could take, says so in place of what became of that."""
    for key, value in (dict(zip(kinds, args, strict=False)) | kwargs).items():
        kind = kinds.get(key, "")
        if not kind.startswith("Tensor"):
            continue
        listed = "[" in kind and isinstance(value, (list, tuple))
        for i, part in enumerate(value if listed else [value]):
            where = f"[{name}] {key}[{i}]" if listed else f"[{name}] {key}"
            if isinstance(part, Tensor):
                if part.dim() > 8:
                    raise ValueError(f"{where} must have at most 8 dimensions, but got {part.dim()}") from error
                if part.device.type not in ("cpu", "cuda"):
                    raise NotImplementedError(
                        f"{where} must be on the cpu or a CUDA device, but got {part.device}"
                    ) from error
                if part.dtype not in _DTYPES:
                    raise TypeError(f"{where} must have one of {_DTYPES}, but got {part.dtype}") from error
            elif kind.startswith("Tensor or"):
                if not isinstance(part, (int, float)):
                    raise TypeError(f"{where} must be a number or a tensor, but got {type(part).__name__}") from error
            elif not (("packed" in kind and isinstance(part, _PACKED)) or (part is None and "?" in kind)):
                raise TypeError(f"{where} must be a torch.Tensor, but got {type(part).__name__}") from error


def _register(name: str, f: Callable) -> tuple[Callable, dict[str, str]]:
    parameters = inspect.signature(f).parameters
    hints = typing.get_type_hints(f)
    kinds = _kinds(f)
    defaults = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    arguments = ", ".join(
        f"Tensor {key}, int[] {key}_format" if kind == "packed" else f"{kind.split()[0]} {key}"
        for key, kind in kinds.items()
    )
    nested, named = hints["return"] == tuple[Tensor, tuple[Tensor, Tensor]], getattr(hints["return"], "_make", None)
    shapes = SHAPES[name]
    _LIBRARY.define(f"{name}({arguments}) -> Tensor[]")
    _LIBRARY.define(f"{name}_backward(Tensor?[] gradients, bool[] wanted, {arguments}) -> Tensor[]")
    op, backward_op = (getattr(torch.ops.pyllm, n).default for n in (name, f"{name}_backward"))

    def call(args):  # positional, as in the schema
        values = _values(kinds, args)
        positional = [values.pop(key) for key in kinds if parameters[key].kind is not inspect.Parameter.KEYWORD_ONLY]
        return _flat(f(*positional, **values))

    def forward(*args):
        with torch.no_grad():
            return call(args)

    def backward(gradients, wanted, *args):
        needed = iter(wanted)
        leaves = []

        def leaf(t):
            t = t.detach()
            if next(needed):
                leaves.append(t.requires_grad_())
            return t

        with torch.enable_grad():
            outputs = call([_map(leaf, a) for a in args])
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        if not pairs:
            return [torch.zeros_like(t) for t in leaves]
        found = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
        return [torch.zeros_like(t) if g is None else g.contiguous() for t, g in zip(leaves, found, strict=True)]

    def fake(*args):
        return shapes(SimpleNamespace(**_values(kinds, args, numbers=False)))  # which are not known while tracing

    def fake_backward(gradients, wanted, *args):
        return [_like(t) for t, needed in zip(_tensors(args), wanted, strict=True) if needed]

    def setup_context(ctx, inputs, output):
        ctx.wanted = [t.requires_grad for t in _tensors(inputs)]
        ctx.others = [_map(lambda t: None, a) for a in inputs]
        ctx.lengths = [len(_tensors([a])) for a in inputs]
        ctx.save_for_backward(*_tensors(inputs))

    def differentiate(ctx, gradients):
        saved = iter(ctx.saved_tensors)
        args = [
            other if not n else [next(saved) for _ in range(n)] if isinstance(other, list) else next(saved)
            for other, n in zip(ctx.others, ctx.lengths, strict=True)
        ]
        found = iter(backward_op(gradients, ctx.wanted, *args))
        each = iter([next(found) if needed else None for needed in ctx.wanted])
        return tuple(_map(lambda t: next(each), a) if n else None for a, n in zip(args, ctx.lengths, strict=True))

    _LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    _LIBRARY.impl(f"{name}_backward", backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pyllm::{name}", fake, lib=_LIBRARY)
    torch.library.register_fake(f"pyllm::{name}_backward", fake_backward, lib=_LIBRARY)
    torch.library.register_autograd(f"pyllm::{name}", differentiate, setup_context=setup_context, lib=_LIBRARY)

    untraced = _disable_dynamo(f)

    def traced(*args, **kwargs):
        values = defaults | dict(zip(kinds, args, strict=False)) | kwargs
        if any(kind.endswith(" packed") and _holds_packed(values.get(key)) for key, kind in kinds.items()):
            return untraced(*args, **kwargs)
        if values.keys() != kinds.keys() or len(args) > len(kinds):
            raise TypeError(f"[{name}] takes {', '.join(kinds)}, but got {len(args)} and {', '.join(kwargs)}")
        out = op(*[part for key, kind in kinds.items() for part in _spread(kind, values[key])])
        if nested:
            return out[0], tuple(out[1:])
        return named(out) if named else out[0] if len(out) == 1 else tuple(out)

    return traced, kinds


def _holds_packed(value) -> bool:
    return any(isinstance(part, _PACKED) for part in (value if isinstance(value, (list, tuple)) else [value]))


def _spread(kind: str, value) -> list:
    """A function's argument as those of the schema."""
    if kind == "packed":
        return [value.panels, [int(n) for n in (*value.layout, *value.shape)]]
    return [_to_schema(kind, value)]


def _values(kinds: dict[str, str], args, *, numbers: bool = True) -> dict:
    """A function's arguments from those of the schema."""
    rest = iter(args)
    values: dict[str, Any] = {}
    for key, kind in kinds.items():
        value = next(rest)
        if kind == "packed":
            bits, group, half, minimums, n, k = next(rest)
            values[key] = PackedQuantizedWeight(value, bits, group, bool(half), bool(minimums), (n, k))
        else:
            values[key] = _from_schema(kind, value) if numbers or not kind.startswith("Tensor or") else None
    return values


def _to_schema(kind: str, value):
    if value is None or not kind.startswith("Tensor"):
        return value
    if kind.startswith("Tensor["):
        return [value] if isinstance(value, Tensor) else list(value)
    if isinstance(value, (int, float)):
        return torch.tensor(value, dtype=torch.int64 if kind.endswith("int") else torch.float64)
    return value


def _from_schema(kind: str, value):
    if value is None or not kind.startswith("Tensor"):
        return value
    if kind.startswith("Tensor["):
        return value[0] if len(value) == 1 and kind.endswith("or one") else tuple(value)
    return value.item() if kind.startswith("Tensor or") and value.dim() == 0 else value


def _map(f, value):
    """f of a tensor or of each of a list of them; anything else as it is."""
    if isinstance(value, Tensor):
        return f(value)
    return [_map(f, t) for t in value] if isinstance(value, (list, tuple)) else value


def _tensors(args) -> list[Tensor]:
    return [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, Tensor)]


def _flat(out) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for part in out for t in _flat(part)]
