"""Speculative decoding: the ids, their log-probabilities and their reasons are those of plain decoding, bit for bit."""

import random

import pytest
import torch

import pyllm
from pyllm.engine.draft import new_speculation
from pyllm.engine.speculation import EIGHTS, FIRST_LOSS, LOSS, Lookup, Luck, Speculation, most_rows

KINDS = {
    "llama": {"num_kv_heads": 2},
    "window": {"window": 70, "head_norm": True},
    "alibi": {"position": "alibi", "norm": "layer_norm"},
    "learned": {"position": "learned", "norm": "layer_norm", "activation": "gelu"},
}
SETTINGS = [
    pyllm.SamplingParams(temperature=0, seed=0),
    pyllm.SamplingParams(temperature=0.3, seed=1),
    pyllm.SamplingParams(temperature=1.1, top_p=0.8, top_k=9, seed=2),
    pyllm.SamplingParams(temperature=0.5, repetition_penalty=1.3, frequency_penalty=0.1, seed=3),
    pyllm.SamplingParams(temperature=0.7, min_p=0.1, typical_p=0.9, allowed_ids=range(0, 40, 3), seed=4),
]


def new(kind, seed=3, layers=2):
    torch.manual_seed(seed)
    model = pyllm.Decoder(40, 16, layers, 4, context_length=400, **KINDS[kind]).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # surer of what comes next, so that texts repeat
    return model


def keen(engine):
    """As if proposing cost nothing, so that much is proposed."""
    if engine._speculation is not None:
        engine._speculation.fixed = engine._speculation.row_cost = engine._speculation.proposer.cost = 0.0
    return engine


def found(engine, asked, steps=0):
    made = []
    for prompt, params, options in asked:
        made.append(engine.submit(prompt, params, **options))
        for _ in range(steps):
            engine.step()
    count = 0
    while any(sample.reason is None for r in made for sample in r.samples):
        engine.step()
        count += 1
    assert engine.pool.pages.available == engine.pool.pages.count and not engine._running
    return [(r.ids, r.logprobs, r.processed_logprobs, r.reason) for first in made for r in first.samples], count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["lookup", "draft", "itself"])
def test_what_is_drawn_is_the_same(kind, by, threads):
    model, rng = new(kind), random.Random(5)
    asked = []
    for i, params in enumerate([*SETTINGS, *SETTINGS]):
        prompt = [rng.randrange(40) for _ in range(rng.randrange(1, 20))] * rng.randrange(1, 6)
        options = {"max_tokens": rng.randrange(1, 60), "n": 2 if i == 1 else 1, "stop_ids": [7] if i % 3 == 0 else []}
        asked.append((prompt, params, options))
    expected, plain = found(pyllm.Engine(model), asked)
    for sequences, pages, chunk in ((3, 20, 30), (16, 100, 256)):
        threads(rng.choice((1, 2)))
        speculate = {"lookup": "lookup", "draft": new("llama", 4, 1), "itself": model}[by]
        engine = keen(pyllm.Engine(model, max_sequences=sequences, num_pages=pages, chunk=chunk, speculate=speculate))
        made, steps = found(engine, asked, rng.randrange(3))
        assert made == expected
        if by != "lookup":
            pool = engine._speculation.proposer.pool.pages
            assert pool.available == pool.count
    assert by != "itself" or steps < plain / 2


def test_a_text_that_repeats_takes_few_steps():
    model = new("llama")
    bias = torch.zeros(40)
    bias[[1, 2, 3]] = 1000.0
    asked = [([1, 2, 3, 1, 2, 3, 1, 2], pyllm.SamplingParams(temperature=0, logit_bias=bias), {"max_tokens": 200})]
    expected, plain = found(pyllm.Engine(model), asked)
    made, steps = found(keen(pyllm.Engine(model, speculate="lookup")), asked)
    assert made == expected and plain == 200 and steps < plain / 5


def test_a_draft_reads_a_prompt_in_pieces_and_goes_back(monkeypatch):
    model, draft = new("llama"), new("llama")
    monkeypatch.setattr("pyllm.engine.draft.PIECE", 50)
    asked = [([i % 7 for i in range(180)], SETTINGS[1], {"max_tokens": 40})]
    expected, plain = found(pyllm.Engine(model), asked)
    made, steps = found(keen(pyllm.Engine(model, speculate=draft)), asked)
    assert made == expected and steps < plain / 3
    with torch.no_grad():
        draft.embedding.weight.mul_(-1)  # a draft that was trained meanwhile is read anew
    engine = keen(pyllm.Engine(model, speculate=draft))
    assert found(engine, asked)[0] == expected
    assert found(engine, asked)[0] == expected


class Wrong:
    """Proposes what is never drawn."""

    cost = 0.0

    def __init__(self):
        self.proposed = self.times = 0

    def propose(self, asked):
        self.proposed += sum(asked.values())
        self.times += 1
        return {request: [39] * most for request, most in asked.items()}

    def agree(self, request, length):
        pass

    def end(self, request):
        pass

    def reset(self):
        pass


def test_where_nothing_stands_little_is_lost():
    model = new("llama")
    for count in (1, 4):
        engine = pyllm.Engine(model)
        wrong = Wrong()
        engine._speculation = Speculation(model, wrong, engine.steps.ids.shape[0])
        engine._speculation.fixed = 0.05
        bias = torch.zeros(40)
        bias[39] = float("-inf")
        asked = [([i + 1], pyllm.SamplingParams(seed=i, logit_bias=bias), {"max_tokens": 200}) for i in range(count)]
        found(engine, asked)
        fixed, each = engine._speculation._costs(count)
        lost = wrong.times * fixed * count + wrong.proposed * each
        assert 0 < lost <= count * (FIRST_LOSS + LOSS * 200)


def test_more_is_proposed_the_more_stands_and_the_less_it_costs():
    luck = Luck(1000)
    assert luck.best(0.0, 0.1, 0) == 0 and luck.best(0.0, 2.0, 16) == 0 and 0 < luck.best(0.0, 0.1, 16) < 16
    for _ in range(9):
        luck.learn(8, 7, 1.0)
    assert luck.best(0.1, 0.1, 16) == 16 > luck.best(0.1, 0.5, 16) > 0 == luck.best(0.1, 1.0, 16)
    for _ in range(9):
        luck.learn(4, 0, 0.1)
    assert luck.best(0.1, 0.12, 16) < 3
    luck.balance = 0.05
    assert luck.best(0.0, 0.06, 16) == 0


def test_bursts_wait_for_what_is_proposed():
    model, asked = new("llama"), [([5, 6, 5, 6, 5, n], SETTINGS[n], {"max_tokens": 80}) for n in range(3)]
    expected, steps = found(pyllm.Engine(model), asked)
    engine = keen(pyllm.Engine(model, speculate="lookup"))
    speculation = engine._speculation
    made, waits = [engine.submit(p, s, **o) for p, s, o in asked], []
    while any(r.reason is None for r in made):
        engine.step(60.0)
        waits.append(speculation.steps)
    assert [(r.ids, r.logprobs, r.processed_logprobs, r.reason) for r in made] == expected
    assert len(waits) < steps and waits[0] == 1
    speculation.proposer.propose = lambda asked: {}
    request = engine.submit([1], SETTINGS[0], max_tokens=60)
    lengths = []
    while request.reason is None:
        engine.step(60.0)
        lengths.append(len(request.ids))
    assert len(lengths) < 15 and lengths[-3] - lengths[-4] > lengths[3] - lengths[2]


def test_the_rows_of_a_step_are_few_numbers():
    class Many(Wrong):
        def propose(self, asked):
            return {request: [1] * k for request, k in asked.items()}

    model = new("llama")
    speculation, engine = Speculation(model, Many(), most_rows(8)), pyllm.Engine(model)
    speculation.fixed = speculation.row_cost = 0.0
    for count in range(1, 9):
        proposed = speculation.propose([engine.submit([1], max_tokens=99) for _ in range(count)])
        rows = count + sum(map(len, proposed.values()))
        assert len(proposed) == count and rows <= 64 and (rows <= EIGHTS or rows % 8 == 0)


def test_a_lookup_finds_the_last_place_and_goes_on_beyond_the_end():
    class Given:
        guess, sequence = None, [1, 2, 3, 4, 1, 2, 3, 5, 6, 1, 2, 3]

    lookup, given = Lookup(), Given()
    assert lookup.propose({given: 4}) == {given: [5, 6, 1, 2]}
    given.sequence += [5, 6, 1, 2]
    assert lookup.propose({given: 12}) == {given: [3, 5, 6, 1, 2] * 2 + [3, 5]}
    given.sequence += [9]
    assert lookup.propose({given: 3}) == {given: []}
    given.sequence = [9] * 4
    given.guess = None
    assert lookup.propose({given: 3}) == {given: [9, 9, 9]}


def test_a_step_that_fails_for_what_is_proposed_is_done_without():
    model = new("llama")
    engine = pyllm.Engine(model)
    engine._speculation = Speculation(model, Wrong(), engine.steps.ids.shape[0])
    engine._speculation.proposer.propose = lambda asked: {request: [40] for request in asked}
    keen(engine)
    asked = [([5, 6], SETTINGS[1], {"max_tokens": 12}), ([7], SETTINGS[2], {"max_tokens": 12})]
    assert found(engine, asked)[0] == found(pyllm.Engine(model), asked)[0]


def test_a_draft_that_fails_is_named_and_asked_no_more():
    model, draft = new("llama"), new("llama", 4)
    asked = [([5, 6], SETTINGS[1], {"max_tokens": 30})]
    expected, _ = found(pyllm.Engine(model), asked)
    with torch.no_grad():
        draft.head.weight.fill_(float("nan"))
    engine = keen(pyllm.Engine(model, speculate=draft))
    with pytest.warns(UserWarning, match=r"has failed and is not asked again: \[sample\]"):
        assert found(engine, asked)[0] == expected


@pytest.mark.parametrize("by", ["lookup", "draft"])
def test_an_interruption_loses_nothing(by, monkeypatch):
    model = new("llama")
    asked = [([5, 6, 5, 6, 5, n], SETTINGS[n], {"max_tokens": 30}) for n in range(4)]
    expected, _ = found(pyllm.Engine(model), asked)
    for when in range(3, 15):
        engine = keen(pyllm.Engine(model, speculate="lookup" if by == "lookup" else model))
        requests, calls = [engine.submit(p, s, **o) for p, s, o in asked], [0]

        def stopped(then, calls=calls, when=when):
            def run(*args, **kwargs):
                calls[0] += 1
                if calls[0] == when:
                    raise KeyboardInterrupt
                return then(*args, **kwargs)

            return run

        monkeypatch.setattr("pyllm.ops.sample", stopped(pyllm.ops.sample))
        monkeypatch.setattr(engine, "_push", stopped(engine._push))
        interrupted = 0
        while any(r.reason is None for r in requests):
            try:
                engine.step()
            except KeyboardInterrupt:
                interrupted += 1
        monkeypatch.undo()
        assert interrupted == 1
        assert [(r.ids, r.logprobs, r.processed_logprobs, r.reason) for r in requests] == expected


def test_settings_are_checked():
    model = new("llama")
    for error, message, by in (
        (ValueError, "speculate must be 'lookup' or a model, but got 'guess'", "guess"),
        (ValueError, "must have the model's vocabulary of 40, but has one of 41", pyllm.Decoder(41, 16, 1, 2)),
        (TypeError, "must be a model with attention, but has a recurrent state", pyllm.LanguageModel(40, 8)),
        (TypeError, "continues texts, but is an encoder-decoder", pyllm.EncoderDecoder(40, 16, 1, 2)),
    ):
        with pytest.raises(error, match=message):
            pyllm.Engine(model, speculate=by)
    with pytest.raises(TypeError, match="for a model with attention, but it has a recurrent state"):
        pyllm.Engine(pyllm.LanguageModel(40, 8), speculate="lookup")
    assert new_speculation(model, pyllm.Engine(model).pool, "lookup", 8).rows == 64
