"""Compares an operation with its twin: both against the twin run in float64.

The compiled operation may be at most twice as far from the float64 result as its twin is at the same dtype, plus a few
units in the last place of the largest element: an error bound that scales with the problem, not a constant to tune.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_twin(op, reference, inputs: dict, *, slack: float = 8.0, **options) -> None:
    """Forward and backward of op(**inputs, **options); each floating-point tensor of inputs gets a gradient."""
    ours, their, exact = (_run(f, inputs, options, dtype) for f, dtype in
                          ((op, None), (reference, None), (reference, torch.float64)))  # fmt: skip
    assert ours.keys() == their.keys() == exact.keys()
    for name in exact:
        a, b, e = ours[name], their[name], exact[name]
        assert a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.shape} {a.dtype}, not {b.shape} {b.dtype}"
        if not a.numel():
            continue
        if not a.is_floating_point():
            assert torch.equal(a, b), name
            continue
        assert torch.isfinite(a).all() or not torch.isfinite(b).all(), f"{name}: not finite"
        scale = e.abs().max()
        bound = 2 * (b.double() - e).abs().max() + slack * torch.finfo(a.dtype).eps * scale
        error = (a.double() - e).abs().max()
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}, largest element {scale:.3g}"


def _run(f, inputs: dict, options: dict, dtype: torch.dtype | None) -> dict[str, Tensor]:
    leaves = {}

    def leaf(name, value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        # A copy with the strides of the original, so that layouts are compared too.
        t = value.detach() if dtype is None else value.detach().to(dtype)
        leaves[name] = t.requires_grad_()
        return t

    arguments = {}
    for name, value in inputs.items():
        if isinstance(value, list):
            arguments[name] = [leaf(f"{name}{i}", v) for i, v in enumerate(value)]
        else:
            arguments[name] = leaf(name, value)
    out = f(**arguments, **options)
    results = {f"out{i}": t for i, t in enumerate(_flat(out))}
    generator = torch.Generator().manual_seed(1)
    total = None
    for t in results.values():
        if t.requires_grad:
            g = torch.randn(t.shape, generator=generator).to(value_dtype(t, inputs)).to(t)
            term = (t * g).sum()
            total = term if total is None else total + term
    if total is not None:
        total.backward()
    results = {k: t.detach() for k, t in results.items()}
    return results | {f"d{k}": t.grad for k, t in leaves.items() if t.grad is not None}


def value_dtype(t: Tensor, inputs: dict) -> torch.dtype:
    """The dtype of the inputs: gradients are rounded to it in the float64 run too."""
    if t.dtype != torch.float64:
        return t.dtype
    flat = [v for value in inputs.values() for v in (value if isinstance(value, list) else [value])]
    return next(v.dtype for v in flat if isinstance(v, Tensor) and v.is_floating_point())


def _flat(out) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [t for part in out if part is not None for t in _flat(part)]
