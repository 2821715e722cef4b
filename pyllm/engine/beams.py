from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyllm.engine.generation import BEAMS, TextStream, most_tokens, warn_of_unheeded
from pyllm.engine.whole import whole_ids
from pyllm.runtime import raise_found

if TYPE_CHECKING:
    from pyllm.engine.engine import Engine


MOST_PENALTY = 50  # of a length, whose power is a number then


class Beam(NamedTuple):
    """What a beam search found.

    Attributes:
        ids: those generated, with the one that ended it, if one did.
        score: the sum of their log-probabilities, divided by their number to the power of the length penalty.
        text: what they say; empty without a tokenizer.
    """

    ids: list[int]
    score: float
    text: str


class _Row:
    """A sequence that may still go on: a row of a step."""

    ahead = 0

    def __init__(self, prompt: list[int], ids: list[int], total: float, held: Any, max_tokens: int):
        self.prompt, self.ids, self.total, self.held, self.max_tokens = prompt, ids, total, held, max_tokens
        self.sequence = prompt + ids


class Search:
    """A beam search over one prompt, step by step, in pages (or slots) of an engine: those of a beam that goes on in
    several ways are forked. It follows transformers' search: a step looks at the best continuations of all beams, as
    many as there are beams times 2, or times 1 + the number of stop ids. Those that end and are among the best
    `num_beams` are found, if their scores are among the best; and the best of the others go on."""

    def __init__(self, engine: Engine, source: list[int], prompt: list[int], num_beams: int, max_tokens: int,
                 length_penalty: float, early_stopping: bool | str, stop_ids: frozenset[int]):  # fmt: skip
        self.engine, self.source, self.prompt, self.num_beams = engine, source, prompt, num_beams
        self.max_tokens = max_tokens
        self.length_penalty, self.early_stopping, self.stop_ids = length_penalty, early_stopping, stop_ids
        self.held: list[Any] = []  # all that it holds
        self.rows: list[_Row] = []
        self.found: list[tuple[float, list[int]]] = []  # the best first
        self.going = True

    def begin(self) -> bool:
        """Takes room for all beams; False if there is too little now."""
        pool = self.engine.pool
        for _ in range(self.num_beams):
            held = pool.admit(self.prompt, len(self.prompt) + self.max_tokens - 1, self.source)
            if held is None:
                self.end()
                return False
            self.held.append(held)
        self.rows = [_Row(self.prompt, [], 0.0, self.held[0], self.max_tokens)]
        return True

    def end(self) -> None:
        while self.held:
            self.engine.pool.give(self.held.pop())

    def step(self) -> None:
        """Reads a piece of the prompt, or the last id of each beam, which then go on."""
        first, engine = self.rows[0], self.engine
        if self.source and not first.held.source.read:
            return engine.pool.read([first.held.source])
        if first.held.length < len(self.prompt) - 1:
            ids = self.prompt[: min(first.held.length + engine.chunk, len(self.prompt) - 1)]
            state = engine.pool.join([first.held], len(ids) - first.held.length)
            raise_found(
                engine.model.hidden(torch.tensor([ids[first.held.length :]], device=engine.model.device), state)
            )
            engine.pool.part([first.held], state)
            engine.pool.note(first.held, ids, len(ids))
            return
        rows: list[Any] = engine.steps.place(list(self.rows))
        logits = engine.steps.run().float()
        for row in rows:
            engine.pool.note(row.held, row.sequence, len(row.sequence))
        engine.steps.place([])  # so that each is where it can be forked
        self._go_on(rows, engine.constrained(rows, torch.log_softmax(logits, -1)))

    def _go_on(self, rows: list[_Row], logprobs: Tensor) -> None:
        totals = (logprobs + torch.tensor([row.total for row in rows], device=logprobs.device)[:, None]).flatten()
        count = min(max(2, 1 + len(self.stop_ids)) * self.num_beams, len(totals))
        best = totals.topk(count)
        length, vocabulary = len(rows[0].ids) + 1, logprobs.shape[1]
        going: list[tuple[_Row, int, float]] = []
        for rank, (total, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            row, i = rows[place // vocabulary], place % vocabulary
            if i not in self.stop_ids and length < self.max_tokens:
                going.append((row, i, total))
            elif rank < self.num_beams and total > -math.inf:
                self.found.append((total / length**self.length_penalty, [*row.ids, i]))
        self.found = sorted(self.found, key=lambda f: -f[0])[: self.num_beams]
        self._fork(going[: self.num_beams])
        self.going = bool(self.rows) and not (self._full and (self.early_stopping is True or not self._may_improve()))

    @property
    def _full(self) -> bool:
        return len(self.found) == self.num_beams

    def _may_improve(self) -> bool:
        longest = self.early_stopping == "never" and self.length_penalty > 0
        length = self.max_tokens if longest else len(self.rows[0].ids)
        return self.rows[0].total / length**self.length_penalty > self.found[-1][0]

    def _fork(self, going: Sequence[tuple[_Row, int, float]]) -> None:
        pool = self.engine.pool
        kept: dict[int, Any] = {id(row): row.held for row, _, _ in going}
        for held in self.held:
            if not any(held is k for k in kept.values()):
                pool.give(held)
        self.held, self.rows = list(kept.values()), []
        for row, i, total in going:
            held = kept.pop(id(row), None)  # the first goes on where its beam was
            if held is None:
                held = pool.fork(row.held, row.held.length)
                assert held is not None  # there was room for all
                self.held.append(held)
            self.rows.append(_Row(self.prompt, [*row.ids, i], total, held, self.max_tokens))

    def results(self) -> list[Beam]:
        return [Beam(ids, score, self._text(ids)) for score, ids in self.found]

    def _text(self, ids: list[int]) -> str:
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            return ""
        stream = TextStream(tokenizer, (), () if self.source else self.prompt, self.engine.model.silent_ids)
        return "".join(stream.push(i) for i in ids) + stream.finish()


@torch.no_grad()
def search(engine: Engine, prompt: str | Sequence[int], num_beams: int | None, max_tokens: int | None,
           length_penalty: float | None, early_stopping: bool | str | None,
           stop_ids: Sequence[int]) -> list[Beam]:  # fmt: skip
    """`Engine.beam_search`."""
    ids, model = engine.encode(prompt), engine.model
    warn_of_unheeded(model, BEAMS)
    asked: dict[str, Any] = {"num_beams": 4, "length_penalty": 1.0, "early_stopping": False, **model.unheeded}
    num_beams = asked["num_beams"] if num_beams is None else num_beams
    length_penalty = asked["length_penalty"] if length_penalty is None else length_penalty
    early_stopping = asked["early_stopping"] if early_stopping is None else early_stopping
    most = most_tokens(model, len(ids), max_tokens)
    end = () if engine.tokenizer is None else tuple(engine.tokenizer.eos_ids)
    stops = model.stop_ids.union(whole_ids("a stop id", stop_ids), end)
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping must be True, False or 'never', but got {early_stopping!r}")
    for name, value, kind in (("num_beams", num_beams, int), ("length_penalty", length_penalty, int | float)):
        if not isinstance(value, kind):
            raise ValueError(f"{name} must be a number, but got {value!r}")
    if not abs(length_penalty) <= MOST_PENALTY:
        raise ValueError(f"length_penalty must be from -{MOST_PENALTY} to {MOST_PENALTY}, but got {length_penalty}")
    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, but got {num_beams}")
    source, ids = (ids, list(model.start_ids)) if model.answers else ([], ids)
    length = max(len(source), most) if source else len(ids) + most
    for name, limit in (
        ("the model's context", model.context_length),
        ("the engine's max_length", engine.pool.longest),
    ):
        if limit is not None and length > limit:
            raise ValueError(f"a prompt of {len(source or ids)} tokens and {most} more do not fit {name} of {limit}")
    limits = {"sequences": engine.max_sequences, "pages": engine.pool.room(len(ids) + most - 1, len(source)),
              "vocabulary": model.vocab_size - len(stops)}  # fmt: skip
    for name, limit in limits.items():
        if num_beams > limit:
            raise ValueError(f"the {name} must have room for {num_beams} beams, but have it for {limit}")
    found = Search(engine, source, ids, num_beams, most, length_penalty, early_stopping, stops)
    try:
        while found.going:
            with engine.lock:
                engine.look_at_model()
                if found.held or found.begin():
                    found.step()
                engine.step()  # the others go on, too
    finally:
        with engine.lock:
            found.end()
    return found.results()
