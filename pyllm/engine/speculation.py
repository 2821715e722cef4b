"""Speculative decoding: ids that may come next are read in the same step as the last one, each in a row of its own, and
what is drawn after each is what plain decoding draws there: a proposed id stands if it is what was drawn before it.
Rows do not influence each other and a draw depends on its seed and position alone, so no bit depends on proposals.
(Leviathan et al., 2022, https://arxiv.org/abs/2211.17192, accept with the right probability; here the draws agree.)"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

from pyllm.engine.request import Request
from pyllm.models import Model

MOST = 16  # ids that are proposed at once
ROW_COST = 0.1  # of another row in a step, in steps of one row
QUANTIZED_ROW_COST = 0.2
OWN_BYTES = 15e6  # weights that a step reads in the time that proposing, comparing and a burst broken off take
FIRST_LOSS, LOSS = 1.5, 0.01  # that is risked at first, and then of what is drawn, in ids
FIRST_SHARE = 0.01  # of the ids that are asked for, where that is less
WAIT = 16  # steps that are made at once, at the most, where nothing was proposed for as many
EIGHTS = 16  # rows of a step beyond which their number is a multiple of 8, so that few are recorded


def most_rows(count: int) -> int:
    """Rows of a step, at the most, of so many sequences and what is proposed for them."""
    return min((1 + MOST) * count, max(64, 2 * count + MOST))


class Proposer(Protocol):
    cost: float  # of an id that it proposes, in steps of one row

    def propose(self, asked: dict[Request, int]) -> dict[Request, list[int]]:
        """At most so many ids that may follow each request's sequence."""

    def agree(self, request: Request, length: int) -> None:
        """Of what it read for the request, the first `length` ids are its sequence's."""

    def end(self, request: Request) -> None:
        """The request has ended."""

    def reset(self) -> None:
        """It was interrupted."""


class Luck:
    """How often the ids that were proposed for one request stood, the last ones counting most, and what may be lost by
    proposing more of them. All is counted in ids: what drawing one costs without proposals."""

    def __init__(self, max_tokens: int) -> None:
        self.stood, self.tried, self.drawn = 1.5, 2.0, 0
        self.balance = min(FIRST_LOSS, FIRST_SHARE * max_tokens)

    def best(self, fixed: float, each: float, most: int) -> int:
        """How many to propose where k of them cost fixed + k * each: as many as gain most by what is expected, if the
        balance can bear the loss of all."""
        share, expected, gain, best = self.stood / self.tried, 1.0, 0.0, 0
        total = -fixed
        for k in range(1, most + 1):
            expected *= share
            total += expected - each
            if fixed + k * each > self.balance:
                break
            if total > gain:
                gain, best = total, k
        return best

    def learn(self, proposed: int, stood: int, cost: float) -> None:
        tried = min(stood + 1, proposed)  # what comes after the first that falls says nothing
        kept = 0.9**tried
        self.stood, self.tried = kept * self.stood + stood, kept * self.tried + tried
        self._earn(stood - cost)

    def see(self, drawn: int) -> None:
        """So many ids have been drawn."""
        self._earn(LOSS * (drawn - self.drawn))
        self.drawn = drawn

    def _earn(self, ids: float) -> None:
        self.balance = min(self.balance + ids, 5 * FIRST_LOSS)


class Speculation:
    """Decides how many ids are proposed for each request, by what it costs and what came of it before, and not by the
    clock, so that a run can be repeated. What is lost where nothing stands is bounded."""

    def __init__(self, model: Model, proposer: Proposer, rows: int):
        self.proposer, self.rows = proposer, rows
        self.row_cost = QUANTIZED_ROW_COST if model.quantized_weights() else ROW_COST
        self.fixed, self.failed = OWN_BYTES / model.num_bytes(), False
        self.waited = 0  # how many steps have been made, about, since something was proposed

    @property
    def steps(self) -> int:
        """How many may be made before it is asked again."""
        return max(1, self.waited)

    def propose(self, requests: Sequence[Request]) -> dict[Request, list[int]]:
        found = {} if self.failed else self._proposed(requests)
        self.waited = 0 if found else min(2 * self.waited + 1, WAIT)
        return found

    def _proposed(self, requests: Sequence[Request]) -> dict[Request, list[int]]:
        count = len(requests)
        fixed, each = self._costs(count)
        left = self.rows - count
        most, asked = min(MOST, max(1, left // count)), {}
        for request in requests:
            request.luck = request.luck or Luck(request.max_tokens)
            request.luck.see(len(request.ids))
            k = request.luck.best(fixed, each, min(most, left, request.max_tokens - len(request.ids) - 1))
            if k > 0:
                asked[request] = k
                left -= k
        if not asked:
            self.waited = WAIT
            return {}
        try:
            found = {request: ids for request, ids in self.proposer.propose(asked).items() if ids}
        except Exception as error:
            warnings.warn(f"what proposes ids has failed and is not asked again: {error}", stacklevel=2)
            self.failed = True
            return {}
        more = sum(map(len, found.values()))
        odd = (count + more) % 8
        for _ in range(odd if count + more > EIGHTS and odd <= more // 2 else 0):
            longest = max(found, key=lambda request: len(found[request]))
            found[longest] = found[longest][:-1]
        return {request: ids for request, ids in found.items() if ids}

    def learn(self, request: Request, proposed: list[int], drawn: list[int], count: int) -> int:
        """How many of the ids that were proposed stand, by those that were drawn, one more; before any is noted."""
        if not proposed:
            return 0
        stood = next((i for i, (a, b) in enumerate(zip(proposed, drawn, strict=False)) if a != b),
                     min(len(proposed), len(drawn)))  # fmt: skip
        fixed, each = self._costs(count)
        request.luck.learn(len(proposed), stood, fixed + len(proposed) * each)
        self.proposer.agree(request, len(request.sequence) + stood)
        return stood

    def _costs(self, count: int) -> tuple[float, float]:
        """Of proposing for one of `count` requests, and of each id, in ids."""
        step = 1 + self.row_cost * (count - 1)
        return self.fixed / step, (self.row_cost + self.proposer.cost) * count / step

    def reset(self, requests: Sequence[Request]) -> None:
        """After a step that was broken off."""
        self.proposer.reset()
        for request in requests:
            self.proposer.agree(request, len(request.sequence))


class Lookup:
    """Proposes what followed the last three ids where they came before."""

    cost = 0.0
    LENGTH = 3

    def propose(self, asked: dict[Request, int]) -> dict[Request, list[int]]:
        return {request: self._found(request, most) for request, most in asked.items()}

    def agree(self, request: Request, length: int) -> None:
        """It reads nothing but what was drawn."""

    def end(self, request: Request) -> None:
        request.guess = None

    def reset(self) -> None:
        """What it knows of a sequence stays true."""

    def _found(self, request: Request, most: int) -> list[int]:
        n, ids = self.LENGTH, request.sequence
        if request.guess is None:
            request.guess = ({}, 0)
        places, done = request.guess
        for end in range(max(done, n), len(ids)):
            places[tuple(ids[end - n : end])] = end
        request.guess = (places, max(done, len(ids)))
        at = places.get(tuple(ids[-n:]))
        if at is None:
            return []
        found: list[int] = []
        for i in range(at, at + most):  # beyond the end, what is found goes on as it does
            found.append(ids[i] if i < len(ids) else found[i - len(ids)])
        return found


class Ahead:
    """A row of a step that reads the last of some ids which follow a request's sequence."""

    def __init__(self, request: Request, held: Any, sequence: list[int]):
        self.request, self.held, self.sequence = request, held, sequence
        self.ahead = len(sequence) - 1 - held.length
        self.prompt, self.params, self.bias = request.prompt, request.params, request.bias
        self.positions, self.max_tokens = request.positions, request.max_tokens


def rows_of(requests: Sequence[Request], proposed: dict[Request, list[int]]) -> list[Any]:
    """Each request, followed by the rows of what is proposed for it."""
    rows: list[Any] = []
    for request in requests:
        ids = proposed.get(request, [])
        rows += [request, *(Ahead(request, request.held, request.sequence + ids[:i]) for i in range(1, len(ids) + 1))]
    return rows
