"""Which ids of prompts are read in a step, and which of them in one call of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pyllm.engine.request import Request

PADDING = 0.25  # of the ids of a call, at most
SHARES = 16  # of a step's ids, of which a piece has whole ones where it ends no prompt


def unit(chunk: int) -> int:
    """A share of so many ids: calls of few lengths come again and again."""
    return max(1, chunk // SHARES)


class Piece(NamedTuple):
    """The next so many ids of a request's sequence."""

    request: Request
    length: int

    @property
    def first(self) -> int:
        return self.request.held.length

    @property
    def end(self) -> int:
        return self.first + self.length


def pieces(requests: Sequence[Request], most: int, unit: int) -> Iterator[Piece]:
    """What comes next of each, together at most so many ids; the last id is for each of a request's samples to read."""
    whole = most
    for request in requests:
        own = len(request.sequence) - (len(request.samples) > 1) - request.held.length
        length = own if own <= most else most if most == whole else most // unit * unit
        if length > 0:
            yield Piece(request, length)
            most -= length


def batches(made: Sequence[Piece], context: int | None) -> list[list[Piece]]:
    """Those of about one length together, as padding costs; with it none may go beyond the context. What is hooked is
    alone."""
    found: list[list[Piece]] = []
    for piece in sorted(made, key=lambda p: (p.request.hooks is not None, p.length)):
        batch = [*found[-1], piece] if found else [piece]
        padded = len(batch) * piece.length
        fits = padded <= (1 + PADDING) * sum(p.length for p in batch) and piece.request.hooks is None
        if found and fits and (context is None or max(p.first for p in batch) + piece.length <= context):
            found[-1] = batch
        else:
            found.append([piece])
    return found
