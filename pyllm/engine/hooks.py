"""What one request's activations are, or are to be: hooks on a model's modules while the engine runs that request."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyllm.models import Model

Replacement = Callable[[Tensor, range], Tensor]


class Hooks:
    """Captures what modules give for a request's positions, and puts something else in its place.

    Raises:
        ValueError: a name that no module of the model has.
        TypeError: a replacement that cannot be called.
    """

    def __init__(self, model: Model, capture: Sequence[str], replace: Mapping[str, Replacement]):
        self.capture, self.replace = tuple(dict.fromkeys(capture)), dict(replace)
        modules = dict(model.named_modules())
        for name in (*self.capture, *self.replace):
            if name not in modules or not name:
                near = difflib.get_close_matches(name, modules, 3)
                hint = f": near it are {', '.join(near)}" if near else ""
                raise ValueError(f"[hooks] the model has no module {name!r}{hint}")
        for name, function in self.replace.items():
            if not callable(function):
                raise TypeError(f"[hooks] the replacement of {name} must be a function, but got {function!r:.80}")
        self.modules = {name: modules[name] for name in (*self.capture, *self.replace)}
        self.parts: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in self.capture}

    @property
    def captured(self) -> dict[str, Tensor]:
        return {name: torch.cat([t for _, t in parts]) for name, parts in self.parts.items() if parts}

    @contextmanager
    def watching(self, first: int, count: int) -> Iterator[None]:
        """Hooks what a call of the model with a request's ids, from the first-th on, so many, does in this thread."""
        positions, thread, seen = range(first, first + count), threading.get_ident(), set[str]()

        def hook(name: str) -> Callable[..., Any]:
            def run(module: torch.nn.Module, args: Any, output: Any) -> Any:
                if threading.get_ident() != thread:
                    return None
                if name in seen:
                    raise ValueError(f"[hooks] {name} runs more than once in a step")
                seen.add(name)
                return self._pass(name, module, output, positions)

            return run

        handles = [module.register_forward_hook(hook(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if missing := [name for name in self.modules if name not in seen]:
            raise ValueError(f"[hooks] {missing[0]} does not run in a step")

    def _pass(self, name: str, module: torch.nn.Module, output: Any, positions: range) -> Any:
        """What goes on in place of a module's output; None where that does."""
        y = _activations(module, output)
        if not isinstance(y, Tensor) or y.dim() < 3 or y.shape[:2] != (1, len(positions)):
            raise ValueError(f"[hooks] {name} gives no vectors of positions")
        found = None
        if name in self.replace:
            new = self.replace[name](y[0], positions)
            if not isinstance(new, Tensor) or new.shape != y.shape[1:] or new.dtype != y.dtype:
                got = f"{new.dtype} {tuple(new.shape)}" if isinstance(new, Tensor) else f"a {type(new).__name__}"
                raise ValueError(f"[hooks] the replacement of {name} must give {y.dtype} {tuple(y.shape[1:])}, but "
                                 f"gave {got}")  # fmt: skip
            y = new.detach()[None].contiguous()
            found = _replaced(module, output, y)
        if name in self.parts:
            _put(self.parts[name], positions.start, y[0].detach().clone())
        return found


def _activations(module: torch.nn.Module, output: Any) -> Any:
    if not isinstance(output, tuple):
        return output
    if getattr(module, "adds_later", False):
        return output[1] if output[0] is None else output[1] + output[0]
    return output[0]


def _replaced(module: torch.nn.Module, output: Any, y: Tensor) -> Any:
    if not isinstance(output, tuple):
        return y
    if getattr(module, "adds_later", False):
        return torch.zeros_like(y), y, *output[2:]
    return y, *output[1:]


def _put(parts: list[tuple[int, Tensor]], first: int, t: Tensor) -> None:
    """After a step that was broken off, what is read again takes the place of what was."""
    while parts and parts[-1][0] >= first:
        parts.pop()
    if parts:
        begin, last = parts.pop()
        parts.append((begin, last[: first - begin]))
    parts.append((first, t))
