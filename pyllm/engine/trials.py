"""The contract, tried: a request in an engine, among others and by whatever way, against the plain model alone."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from pyllm import _C, ops
from pyllm.engine.budget import pages_for
from pyllm.engine.decoding import AT_ONCE
from pyllm.engine.engine import Engine
from pyllm.engine.pool import AttentionPool
from pyllm.engine.request import Request
from pyllm.engine.sampling import SamplingParams
from pyllm.models import Model, Pair
from pyllm.nn.state import PAGE_SIZE

PROMPT, TOKENS = 2 * PAGE_SIZE + 22, 24  # the longest prompt, and how many ids are drawn at the most


class Trial:
    """One request, the needle, and what happens around it, all of it by chance."""

    def __init__(self, model: Model, rng: random.Random, neighbours: int):
        self.model, self.rng = model, rng
        self.chunk, self.threads = rng.choice((1, 7, 64, 1000)), rng.choice((1, 2))
        self.recorded, self.known = rng.random() < 0.7, rng.random() < 0.5
        self.speculate = rng.random() < 0.4
        context = model.context_length or PROMPT + TOKENS
        self.tokens = max(1, min(TOKENS, context // 2))
        self.room = max(1, min(PROMPT, context - self.tokens))
        self.prompt, self.most = self._prompt(), rng.randint(1, self.tokens)
        self.others = [(self._prompt(self.prompt), rng.randint(1, self.tokens))
                       for _ in range(rng.randint(0, neighbours))]  # fmt: skip
        self.place = rng.randint(0, len(self.others))

    def __str__(self) -> str:
        how = [f"among {len(self.others)} others", f"read {self.chunk} ids at a time", f"{self.threads} threads"]
        how += ["recorded" if self.recorded else "not recorded"] + ["from a known beginning"] * self.known
        return "in an engine, " + ", ".join(how + ["speculatively"] * self.speculate)

    def run(self) -> Request:
        """The needle, when it has ended."""
        asked = [*self.others[: self.place], (self.prompt, self.most), *self.others[self.place :]]
        pages = [pages_for(self.model, len(prompt), most) for prompt, most in asked]
        room = self.rng.randint(max(pages), sum(pages))
        engine = Engine(self.model, max_sequences=self.rng.randint(1, len(asked)), num_pages=room, chunk=self.chunk)
        if self.speculate and isinstance(engine.pool, AttentionPool):
            engine = Engine(self.model, max_sequences=engine.max_sequences, num_pages=room, chunk=self.chunk,
                            speculate="lookup")  # fmt: skip
        engine.steps.recordable = self.recorded
        if self.known:
            engine.generate([self.prompt], max_tokens=1)
        made = []
        for prompt, most in asked:
            made.append(engine.submit(prompt, self._params(), max_tokens=most, priority=self.rng.randint(0, 1)))
            for _ in range(self.rng.randint(0, 2)):
                engine.step()
        needle = made[self.place]
        while needle.reason is None:
            engine.step(self.rng.choice((0.0, AT_ONCE)))
        if needle.error is not None:
            raise needle.error
        return needle

    def _prompt(self, like: list[int] | None = None) -> list[int]:
        ids = [self.rng.randrange(self.model.vocab_size) for _ in range(self.rng.randint(1, self.room))]
        if like is not None and self.rng.random() < 0.5:
            ids = (like[: self.rng.randint(1, len(like))] + ids)[: self.room]
        return ids

    def _params(self) -> SamplingParams:
        draw = self.rng.choice(({}, {"temperature": 0.0}, {"top_p": 0.9}, {"repetition_penalty": 1.2}, {"top_k": 9}))
        return SamplingParams(**draw, seed=self.rng.randrange(2**31))


def alone(model: Model, request: Request) -> ops.Sample:
    """What the whole model draws for each of a request's ids, given those before it."""
    ids, first = torch.tensor([request.sequence[:-1]], device=model.device), len(request.prompt) - 1
    logits = model(Pair(torch.tensor([request.source], device=ids.device), ids) if model.answers else ids)[0, first:]
    if type(model).constrain is not Model.constrain:
        rows = enumerate(logits.split(1))
        logits = torch.cat([model.constrain(row, step, request.max_tokens) for step, row in rows])
    history = torch.tensor([request.sequence] * len(logits))
    positions = torch.arange(len(request.prompt), len(request.sequence))
    history.masked_fill_(torch.arange(len(request.sequence)) >= positions[:, None], -1)
    assert request.params.seed is not None
    bias = None if request.bias is None else request.bias.to(ids.device)
    sample = ops.sample(logits, seeds=request.params.seed, positions=positions, history=history.to(ids.device),
                        logit_bias=bias, **request.params.settings())  # fmt: skip
    return ops.Sample(*(t.cpu() for t in sample))


@torch.no_grad()
def run_trials(model: Model, count: int, neighbours: int, seed: int,
               progress: Callable[[int], None] | None = None) -> tuple[str, int, float] | None:  # fmt: skip
    """Runs so many trials, each with up to so many neighbours.

    Returns:
        The first that draws something else than the whole model alone: its name, the position of the first id that
        differs, or whose log-probability does, and by how much; None if there is none.
    """
    rng, threads = random.Random(seed), _C.num_threads()
    try:
        for i in range(count):
            # Its own chance: how often the one before it was asked for depends on how fast steps were.
            trial = Trial(model, random.Random(rng.getrandbits(64)), neighbours)
            _C.set_num_threads(trial.threads)
            request = trial.run()
            _C.set_num_threads(threads)
            expected = alone(model, request)
            found = (request.ids, request.logprobs, request.processed_logprobs)
            differs = torch.stack([torch.tensor(a) != b for a, b in zip(found, expected, strict=True)])
            if differs.any():
                position = len(request.prompt) + int(differs.any(0).nonzero()[0])
                by = [torch.tensor(a)[d] - b[d] for a, b, d in zip(found[1:], expected[1:], differs[1:], strict=True)]
                return str(trial), position, float(torch.cat(by).abs().max()) if differs[1:].any() else 0.0
            if progress is not None:
                progress(i + 1)
    finally:
        _C.set_num_threads(threads)
    return None
