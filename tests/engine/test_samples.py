"""Several continuations of a prompt, requests that time out, ids that are allowed."""

import random

import pytest
import torch

import pyllm
from pyllm.engine import generate_ids


def new(kind):
    torch.manual_seed(3)
    if kind in ("llama", "window"):
        return pyllm.Decoder(40, 16, 2, 4, context_length=300, window=70 if kind == "window" else None).eval()
    return pyllm.LanguageModel(40, 16, 2, cell=kind).eval()


def alone(model, prompt, params, max_tokens):
    return [i for (i,) in generate_ids(model, [prompt], params, max_tokens=max_tokens)]


def run(engine, *requests):
    while any(sample.reason is None for r in requests for sample in r.samples):
        engine.step()


@pytest.mark.parametrize(("kind", "length"), [*(("llama", n) for n in (1, 2, 64, 65)), ("window", 130), ("lstm", 130)])
def test_samples_are_those_of_requests_with_their_seeds(kind, length):
    model, prompt = new(kind), [i * i % 40 for i in range(length)]
    expected = [alone(model, prompt, pyllm.SamplingParams(seed=7 + i), 12) for i in range(4)]
    for sequences, pages, chunk in ((8, 40, 256), (3, 6, 50), (1, 3, 9)):
        engine = pyllm.Engine(model, max_sequences=sequences, num_pages=pages, chunk=chunk)
        neighbour = engine.submit([1, 2, 3], pyllm.SamplingParams(seed=1), max_tokens=15)
        first = engine.submit(prompt, pyllm.SamplingParams(seed=7), max_tokens=12, n=4)
        run(engine, first, neighbour)
        assert [r.ids for r in first.samples] == expected and first.samples[0] is first
        assert neighbour.ids == alone(model, [1, 2, 3], pyllm.SamplingParams(seed=1), 15)
        if kind in ("llama", "window"):
            assert engine.pool.pages.available == pages
        else:
            assert engine.pool.free == sequences


def test_a_prompt_is_read_once_for_all_samples(monkeypatch):
    for kind, chunk in (("llama", 256), ("lstm", 256), ("llama", 30)):
        model, read = new(kind), []
        hidden = model.hidden
        monkeypatch.setattr(model, "hidden", lambda ids, *args, hidden=hidden, read=read: read.append(ids.shape) or
                            hidden(ids, *args), raising=False)  # fmt: skip
        engine = pyllm.Engine(model, max_length=300, chunk=chunk)
        engine.steps.recordable = False  # so that each call is seen
        (made,) = engine.generate([[3] * 101], max_tokens=5, n=6)
        assert len({tuple(r.ids) for r in made.samples}) > 1
        assert sum(rows * time for rows, time in read if time > 1) == 100
        assert read[-(-100 // chunk)] == (6, 1)


def test_samples_outlive_the_one_that_reads_for_them():
    model, params = new("llama"), pyllm.SamplingParams(seed=3)
    for steps in range(4):
        engine = pyllm.Engine(model, chunk=40)
        first = engine.submit([5] * 100, params, max_tokens=9, n=3)
        for _ in range(steps):
            engine.step()
        first.cancel()
        run(engine, first)
        assert first.reason == "cancelled"
        assert [r.ids for r in first.samples[1:]] == [alone(model, [5] * 100, pyllm.SamplingParams(seed=s), 9)
                                                      for s in (4, 5)]  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "lstm"])
def test_samples_survive_an_interruption(kind, monkeypatch):
    model = new(kind)
    engine = pyllm.Engine(model, max_length=200)
    first = engine.submit([5] * 100, pyllm.SamplingParams(seed=3), max_tokens=9, n=3)
    for _ in range(3):
        engine.step()
    monkeypatch.setattr(engine.pool, "advance", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    run(engine, first)
    assert [r.ids for r in first.samples] == [alone(model, [5] * 100, pyllm.SamplingParams(seed=3 + i), 9)
                                              for i in range(3)]  # fmt: skip


def test_the_seeds_of_samples_go_round():
    engine = pyllm.Engine(new("lstm"))
    first = engine.submit([1], pyllm.SamplingParams(seed=2**63 - 1), max_tokens=1, n=2)
    assert [r.params.seed for r in first.samples] == [2**63 - 1, -(2**63)]
    assert len({r.params.seed for r in engine.submit([1], n=3).samples}) == 3


@pytest.mark.parametrize("kind", ["llama", "lstm"])
def test_a_request_times_out_where_it_is(kind):
    model, now, params = new(kind), [0.0], pyllm.SamplingParams(seed=2)
    engine = pyllm.Engine(model, max_sequences=2, max_length=64, clock=lambda: now[0])
    other = engine.submit([1], params, max_tokens=12)
    running = engine.submit([1], params, max_tokens=12, timeout=5)
    waiting = engine.submit([1], params, max_tokens=12, timeout=4.5)
    late = engine.submit([1], params, max_tokens=12, timeout=1000)
    while other.reason is None:
        engine.step()
        now[0] += 1
    expected = alone(model, [1], params, 12)
    assert (running.reason, running.ids, other.ids) == ("timeout", expected[:5], expected)
    assert waiting.reason == "timeout" and not waiting.ids
    run(engine, late)
    assert (late.reason, late.ids) == ("length", expected) and not engine._running


@pytest.mark.parametrize("kind", ["llama", "lstm"])
def test_only_allowed_ids_are_drawn(kind):
    model, rng = new(kind), random.Random(0)
    engine = pyllm.Engine(model, max_length=128)
    bias = torch.zeros(40)
    bias[7] = 50
    settings = [pyllm.SamplingParams(allowed_ids=[3, 7, 9], seed=1), pyllm.SamplingParams(seed=1),
                pyllm.SamplingParams(allowed_ids=[3], temperature=0, seed=1),
                pyllm.SamplingParams(allowed_ids=[3, 7], logit_bias=bias, seed=1),
                pyllm.SamplingParams(allowed_ids=[3, 9], logit_bias=bias, repetition_penalty=1.2, seed=1)]  # fmt: skip
    prompts = [[rng.randrange(40) for _ in range(n)] for n in (1, 5, 70, 3, 9)]
    made = engine.generate(prompts, settings, max_tokens=25)
    assert [r.ids for r in made] == [alone(model, p, s, 25) for p, s in zip(prompts, settings, strict=True)]
    assert set(made[0].ids) == {3, 7, 9} and set(made[2].ids) == {3} and set(made[3].ids) == {7}
    assert set(made[4].ids) <= {3, 9} and made[2].processed_logprobs[0] == 0.0 > made[2].logprobs[0]


def test_settings_are_checked():
    engine = pyllm.Engine(new("lstm"))
    for error, message, options in (
        (ValueError, "n must be at least 1, but got 0", {"n": 0}),
        (TypeError, "on_token must be for one continuation, but n is 2", {"n": 2, "on_token": print}),
        (ValueError, "timeout must be positive, but got 0", {"timeout": 0}),
        (ValueError, "timeout must be positive, but got nan", {"timeout": float("nan")}),
        (ValueError, "at least one id", {"params": pyllm.SamplingParams(allowed_ids=[])}),
        (TypeError, "an allowed id .*1.5", {"params": pyllm.SamplingParams(allowed_ids=[1, 1.5])}),
        (IndexError, "from 0 to 39, but got 40", {"params": pyllm.SamplingParams(allowed_ids=[1, 40])}),
        (ValueError, r"shape \(40,\), but got \(39,\)", {"params": pyllm.SamplingParams(logit_bias=torch.zeros(39))}),
    ):
        with pytest.raises(error, match=message):
            engine.submit([1], **options)
    with pytest.raises(TypeError, match="stream must be of one continuation, but n is 2"):
        next(engine.stream([1], n=2))
    assert not engine._waiting
