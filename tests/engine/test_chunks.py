"""Recorded reading of prompts: for each number of sequences and of ids, rounded up."""

import random

import pytest
import torch

import pyllm
from pyllm.engine import chunks, recording


@pytest.fixture
def recorded(monkeypatch):
    made = []

    class Counted(recording.Recording):
        def __enter__(self):
            made.append(self)
            return super().__enter__()

    monkeypatch.setattr(chunks, "Recording", Counted)
    return made


def new(**options):
    torch.manual_seed(3)
    return pyllm.Decoder(40, 16, 2, 4, context_length=300, **options).eval()


def read(engine, prompts):
    requests = [engine.submit(p, pyllm.SamplingParams(seed=1), max_tokens=3) for p in prompts]
    while any(r.reason is None for r in requests):
        engine.step()
    return [(r.ids, r.logprobs) for r in requests]


@pytest.mark.parametrize("options", [{}, {"window": 70}, {"position": "learned"}, {"position": "alibi"}])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_calls_of_few_shapes_read_all_prompts_with_the_same_bits(options, kv_cache_dtype, recorded):
    rng, model = random.Random(0), new(**options)
    prompts = [[rng.randrange(40) for _ in range(rng.randrange(1, 250))] for _ in range(30)]
    prompts += [[rng.randrange(40) for _ in range(20)] for _ in range(8)] * 2  # together
    alone = pyllm.Engine(model, kv_cache_dtype=kv_cache_dtype, chunk=300)
    alone.steps.recordable = False
    expected = [read(alone, [p])[0] for p in prompts]
    assert not recorded
    engine = pyllm.Engine(model, kv_cache_dtype=kv_cache_dtype, chunk=64, max_sequences=8, num_pages=40)
    assert read(engine, prompts) == expected
    assert 5 < len(recorded) < 40
    assert all(length % 4 == 0 for _, length in engine._chunks.recorded)
    count = len(recorded)
    assert read(engine, prompts) == expected and len(recorded) - count < 12
    assert engine.pool.pages.available == 40


def test_another_model_is_recorded_anew(recorded):
    model, prompts = new(), [[1] * 40, [2] * 40, [3] * 40]
    engine = pyllm.Engine(model, max_sequences=1, reuse_prefixes=False)
    before = read(engine, prompts)
    assert len(recorded) == 1
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert read(engine, prompts) != before
    assert len(recorded) == 2


def test_an_unknown_id_ends_its_request_alone():
    model, prompts = new(), [[i] * 40 for i in range(6)]
    engine = pyllm.Engine(model, reuse_prefixes=False)
    for _ in range(3):
        expected = read(engine, prompts)
    assert (6, 48) in engine._chunks.recorded
    bad = engine.submit([5] * 39 + [40], max_tokens=3)
    assert read(engine, prompts[:5]) == expected[:5]
    assert bad.reason == "error" and isinstance(bad.error, IndexError)
