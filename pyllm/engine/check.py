from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyllm import _C
from pyllm.engine.budget import new_pool
from pyllm.engine.trials import run_trials
from pyllm.models import Model, Pair
from pyllm.nn.evaluating import evaluating


@dataclass
class Difference:
    """Where a way of running a model first gives other bits than the whole sequence at once does."""

    way: str  # what was done: "in pieces of 1", "in a batch", ...
    module: str  # the first module, in the order that they run, whose output differs
    row: int
    position: int
    largest: float  # the largest difference in that module's output

    def __str__(self) -> str:
        return (f"{self.way}: {self.module or 'the model'} first differs, in row {self.row} at position "
                f"{self.position}, by up to {self.largest:.3g}")  # fmt: skip


@torch.no_grad()
def check(model: Model, *, length: int = 40, batch_size: int = 3, trials: int = 4, neighbours: int = 7, seed: int = 0,
          progress: Callable[[int], Any] | None = None) -> list[Difference]:  # fmt: skip
    """Runs a model on random ids in every way that must give the same bits, and compares them module by module.

    The whole sequence at once is compared with: the same in pieces of 1, of 7, of 64 where it is longer, and of growing
    size (unless the model sees whole texts only), each row alone, and another number of threads; rows padded to
    different lengths with each alone. An encoder-decoder gets random sources too, and rows whose sources are padded.

    If all that is the same, a request in an `Engine` is tried, if one takes the model, with what it draws and the
    log-probabilities: among others that come and go, read in pieces or from a beginning that is known, recorded or not,
    speculatively or not, with 1 or 2 threads.

    Args:
        trials, neighbours: how many times, among how many others at the most.
        progress: is called with how many trials are done.

    Returns:
        The first difference of each way that differs; an empty list if the model keeps the contract.

    Raises:
        ValueError: a length or batch size below 2, or one longer than the model's context; a count below 0.
    """
    if length < 2 or batch_size < 2:
        raise ValueError(f"length and batch_size must be at least 2, but got {length} and {batch_size}")
    if trials < 0 or neighbours < 0:
        raise ValueError(f"trials and neighbours must be at least 0, but got {trials} and {neighbours}")
    generator = torch.Generator().manual_seed(seed)
    ids, source = (torch.randint(model.vocab_size, (batch_size, length), generator=generator).to(model.device)
                   for _ in range(2))  # fmt: skip
    full = torch.full((batch_size,), length, device=model.device)

    def given(rows: slice = slice(None), n: int | None = None) -> Tensor | Pair:
        return Pair(source[rows, :n], ids[rows, :n]) if model.answers else ids[rows, :n]

    def state(lengths: Tensor = full):
        return model.begin(source, lengths, length)[0]

    threads = _C.num_threads()
    with evaluating(model), contextlib.ExitStack() as after:
        after.callback(_C.set_num_threads, threads)
        whole = _outputs(model, [given()], None)
        found = []
        ways = {str(size): [size] * (length // size) for size in (1, 7, 64) if size == 1 or size < length}
        for name, sizes in (ways | {"growing size": [1, 2, 4, 8]}).items() if model.causal else ():
            sizes = [*sizes, length - sum(sizes)] if sum(sizes) < length else sizes
            sizes = sizes if sum(sizes) == length else [length]
            pieces = _outputs(model, list(ids.split(sizes, 1)), state())
            found.append(_first_difference(f"in pieces of {name}", whole, pieces))
        alone = [_outputs(model, [given(slice(row, row + 1))], None) for row in range(batch_size)]
        joined = {name: torch.cat([a[name] for a in alone]) for name in whole if all(name in a for a in alone)}
        found.append(_first_difference("each row alone", whole, joined))
        lengths = torch.tensor([max(1, length - 3 * row) for row in range(batch_size)], device=model.device)
        padded = _outputs(model, [ids], state(lengths) if model.causal else None, lengths)
        for row, n in enumerate(lengths.tolist()):
            of_row = {name: t[row : row + 1, :n] for name, t in padded.items()}
            differs = _first_difference("padded", _outputs(model, [given(slice(row, row + 1), n)], None), of_row, row)
            if differs is not None:
                found.append(differs)
                break
        _C.set_num_threads(1 if threads > 1 else 2)
        found.append(_first_difference("with another number of threads", whole, _outputs(model, [given()], None)))
        if not any(found) and _has_engine(model):
            first = run_trials(model, trials, neighbours, seed, progress)
            found.append(None if first is None else Difference(first[0], "", 0, *first[1:]))
    return [d for d in found if d is not None]


def _has_engine(model: Model) -> bool:
    if not model.causal:
        return False
    try:
        new_pool(model, 1, 1, None, False)
    except TypeError:
        return False
    return True


def _outputs(model: Model, pieces: Sequence[Any], state, lengths: Tensor | None = None) -> dict[str, Tensor]:
    """Each module's output (B, T, ...), in the order that they ran, over all pieces."""
    seen: dict[str, list[Tensor]] = {}
    with _hooks(model, seen):
        for piece in pieces:
            model(piece, state, lengths) if lengths is not None else model(piece, state)
    if len(pieces) == 1:
        return {name: parts[0] for name, parts in seen.items() if len(parts) == 1}
    shapes = [piece.shape for piece in pieces]
    return {name: torch.cat(parts, 1) for name, parts in seen.items() if [part.shape[:2] for part in parts] == shapes}


@contextmanager
def _hooks(model: Model, seen: dict[str, list[Tensor]]):
    def hook(name):
        def note(module, args, output):
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and not name and first.dim() == 2:
                first = first[:, None]  # one result a sequence
            if isinstance(first, Tensor) and first.dim() >= 3:
                seen.setdefault(name, []).append(first)

        return note

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_difference(way: str, whole: dict[str, Tensor], other: dict[str, Tensor],
                      first_row: int = 0) -> Difference | None:  # fmt: skip
    for name, expected in whole.items():
        found = other.get(name)
        if found is None or found.shape != expected.shape:
            continue
        differs = (found != expected).flatten(2).any(-1)
        if differs.any():
            row, position = differs.nonzero()[0].tolist()
            return Difference(way, name, first_row + row, position, float((found - expected).abs().max()))
    return None
