from __future__ import annotations

from typing import Any

import torch

from pyllm.engine.budget import new_pool
from pyllm.engine.draws import Draws
from pyllm.engine.pool import AttentionPool
from pyllm.engine.request import Request
from pyllm.engine.speculation import Ahead, Lookup, Proposer, Speculation, most_rows
from pyllm.engine.steps import Steps
from pyllm.engine.watch import Watch
from pyllm.models import Model
from pyllm.nn.state import PAGE_SIZE

PIECE = 256  # ids that are read in one call
UNREAD = 3  # ids of a sequence that are read in rows of a step; more are read in a piece


class Draft:
    """Proposes what a smaller model draws, by the request's settings and with its random numbers."""

    def __init__(self, model: Model, target: Model, count: int, num_pages: int):
        if model.vocab_size != target.vocab_size:
            raise ValueError(f"a draft must have the model's vocabulary of {target.vocab_size}, but has one of "
                             f"{model.vocab_size}")  # fmt: skip
        if model.answers:
            raise TypeError("a draft must be a model that continues texts, but is an encoder-decoder")
        pool = new_pool(model, count, num_pages, None, True)
        if not isinstance(pool, AttentionPool):
            raise TypeError("a draft must be a model with attention, but has a recurrent state, which cannot go back")
        self.model, self.pool, self.cost = model, pool, model.num_bytes() / target.num_bytes()
        self.steps, self.watch = Steps(model, pool, UNREAD * count), Watch(model)

    def propose(self, asked: dict[Request, int]) -> dict[Request, list[int]]:
        self._look()
        asked = {request: min(most, self._room(request)) for request, most in asked.items()}
        found: dict[Request, list[int]] = {}
        for request, most in asked.items():
            if most > 0 and self._begin(request):
                self._catch_up(request)
                found[request] = []
        rows = [Ahead(request, request.guess, request.sequence[:end]) for request in found
                for end in range(request.guess.length + 1, len(request.sequence) + 1)]  # fmt: skip
        while rows:
            last = [i for i, row in enumerate(rows) if i + 1 == len(rows) or rows[i + 1].request is not row.request]
            self.steps.place(rows)
            logits = self.steps.run()[last]
            rows = [rows[i] for i in last]
            for row, i in zip(rows, Draws()(rows, logits).ids.tolist(), strict=True):
                found[row.request].append(i)
                row.request.guess.length = len(row.sequence)
            rows = [Ahead(row.request, row.held, [*row.sequence, found[row.request][-1]]) for row in rows
                    if len(found[row.request]) < asked[row.request]]  # fmt: skip
        return found

    def agree(self, request: Request, length: int) -> None:
        if request.guess is not None:
            request.guess.length = min(request.guess.length, length)

    def end(self, request: Request) -> None:
        if request.guess is not None:
            self.pool.give(request.guess)
            request.guess = None

    def reset(self) -> None:
        self.steps.clear()

    def _look(self) -> None:
        if self.model.training:
            self.model.eval()
        if self.watch.changed():
            self.steps.forget()
            self.pool.forget()

    def _room(self, request: Request) -> int:
        context = self.model.context_length
        return request.max_tokens if context is None else context - len(request.sequence)

    def _begin(self, request: Request) -> bool:
        if request.guess is None:
            request.guess = self.pool.admit(request.sequence, min(request.positions, self.pool.width * PAGE_SIZE))
        return request.guess is not None

    def _catch_up(self, request: Request) -> None:
        held: Any = request.guess
        while len(request.sequence) - held.length > UNREAD:
            ids = request.sequence[: min(held.length + PIECE, len(request.sequence) - 1)]
            state = self.pool.join([held], len(ids) - held.length)
            self.model.hidden(torch.tensor([ids[held.length :]], device=self.model.device), state)
            self.pool.note(held, ids, len(ids))


def new_speculation(model: Model, pool: Any, by: str | Model, count: int) -> Speculation:
    """Raises:
    ValueError, TypeError: a way that is not known, or a model or a draft that it does not fit.
    """
    if not isinstance(pool, AttentionPool):
        raise TypeError("speculate must be for a model with attention, but it has a recurrent state, which cannot go "
                        "back")  # fmt: skip
    proposer: Proposer
    if isinstance(by, Model):
        proposer = Draft(by, model, count, pool.pages.count)
    elif by == "lookup":
        proposer = Lookup()
    else:
        raise ValueError(f"speculate must be 'lookup' or a model, but got {by!r}")
    return Speculation(model, proposer, most_rows(count))
