"""Several steps in one call: what comes of them is what comes of as many single ones."""

import pytest
import torch
from engine.test_engine import KINDS, TEXT, new

import pyllm

LONG = 60.0  # seconds: a burst ends where a sequence does


def told(requests):
    return [(r.ids, r.logprobs, r.processed_logprobs, r.text, r.reason) for r in requests]


def run(model, seconds, prompts, settings, tokenizer=None, **options):
    engine = pyllm.Engine(model, tokenizer, max_sequences=4, num_pages=60)
    made = [engine.submit(prompt, own, **options | {"max_tokens": 9 + 40 * i})
            for i, (prompt, own) in enumerate(zip(prompts, settings, strict=True))]  # fmt: skip
    steps = 0
    while any(r.reason is None for r in made):
        engine.step(seconds)
        steps += 1
    if hasattr(engine.pool, "pages"):
        assert engine.pool.pages.available == 60
    return engine, made, steps


@pytest.mark.parametrize("kind", KINDS)
def test_bursts_draw_what_single_steps_draw(kind, threads):
    model = new(kind)
    prompts = [[i * k % 40 for i in range(n)] for n, k in ((3, 7), (70, 3), (64, 11))]
    settings = [pyllm.SamplingParams(temperature=t, top_p=p, seed=s) for s, (t, p) in
                enumerate(((0.0, 1.0), (1.0, 0.9), (1.3, 1.0)))]  # fmt: skip
    threads(2)
    plain = run(model, 0.0, prompts, settings)
    found = run(model, LONG, prompts, settings)
    assert told(found[1]) == told(plain[1]) and found[2] < plain[2] / 3
    stop = plain[1][2].ids[40]
    plain, found = (told(run(model, s, prompts, settings, stop_ids=[stop])[1]) for s in (0.0, LONG))
    assert found == plain and found[2][-1] == "stop"


@pytest.mark.parametrize("kind", ["llama", "lstm"])
def test_bursts_with_texts_that_end_within_them(kind):
    tokenizer = pyllm.Tokenizer.train("bpe:280", [TEXT])
    model = new(kind, tokenizer.vocab_size)
    settings = [pyllm.SamplingParams(seed=s) for s in (1, 2)]
    text = run(model, 0.0, ["the fox", "dog"], settings, tokenizer)[1][1].text
    stops = [text[20:23]]
    plain, found = (told(run(model, s, ["the fox", "dog"], settings, tokenizer, stop=stops)[1]) for s in (0.0, LONG))
    assert found == plain and found[1][-1] == "stop" and found[1][3] == text[: text.index(stops[0])]


def test_what_a_burst_wrote_is_reused():
    model, prompt = new("llama"), list(range(30))
    engine, (request,), _ = run(model, LONG, [prompt], [pyllm.SamplingParams(seed=1)], stop_ids=[])
    assert len(request.ids) == 9
    (request,) = engine.generate([prompt], pyllm.SamplingParams(seed=1), max_tokens=180)
    again = engine.submit([*request.sequence, 1], pyllm.SamplingParams(temperature=0), max_tokens=2)
    engine.step()
    assert again.held.length >= 192
    expected = pyllm.Engine(model).generate([again.prompt], pyllm.SamplingParams(temperature=0), max_tokens=2)
    while again.reason is None:
        engine.step(LONG)
    assert told([again]) == told(expected)


@pytest.mark.parametrize("kind", ["llama", "lstm"])
def test_a_row_that_is_not_finite_ends_alone(kind):
    torch.manual_seed(3)
    model = pyllm.LanguageModel(3000, 16, 1) if kind == "lstm" else pyllm.Decoder(3000, 16, 1, 2, tie_embeddings=False)
    settings = [pyllm.SamplingParams(seed=s) for s in (1, 2, 3)]
    prompts = [[1, 2, 3], [7, 8], [20, 21]]
    plain = run(model, 0.0, prompts, settings)[1]
    others = {*plain[0].sequence, *plain[1].sequence, *plain[2].sequence[:12]}
    poison = next(i for i in plain[2].ids if i not in others)
    with torch.no_grad():
        model.embedding.weight[poison] = float("nan")
    results = [told(run(model, s, prompts, settings)[1]) for s in (0.0, LONG)]
    assert results[0] == results[1]
    assert [r[-1] for r in results[1]] == ["length", "length", "error"]
    assert results[1][:2] == told(plain[:2])
    assert results[1][2][0] == plain[2].ids[: plain[2].ids.index(poison) + 1]


def test_a_callback_ends_its_request_within_a_burst():
    model, got = new("llama"), []
    engine = pyllm.Engine(model, max_sequences=2)

    def cancel(i, piece):
        got.append(i)
        if len(got) == 5:
            one.cancel()

    def fail(i, piece):
        if len(other.ids) == 7:
            raise RuntimeError("enough")

    one = engine.submit([1, 2], pyllm.SamplingParams(seed=1), max_tokens=50, on_token=cancel)
    other = engine.submit([3], pyllm.SamplingParams(seed=1), max_tokens=50, on_token=fail)
    while other.reason is None:
        engine.step(LONG)
    assert one.reason == "cancelled" and one.ids == got and len(got) == 5
    assert other.reason == "error" and len(other.ids) == 7 and str(other.error) == "enough"
    assert engine.pool.pages.available == engine.pool.pages.count


def test_settings_that_need_all_that_was_drawn_are_for_single_steps():
    model, prompts = new("llama"), [[1, 2, 3]] * 2
    for own in (pyllm.SamplingParams(seed=1, repetition_penalty=1.3), pyllm.SamplingParams(seed=1, allowed_ids=[1, 5])):
        plain, found = (run(model, s, prompts, [own, pyllm.SamplingParams(seed=2)]) for s in (0.0, LONG))
        assert told(found[1]) == told(plain[1])


@pytest.mark.parametrize("crowded", [False, True])
def test_while_a_prompt_is_read_others_draw_in_single_steps_unless_somebody_waits_for_a_place(crowded):
    engine = pyllm.Engine(new("llama"), max_sequences=2, chunk=16)
    first = engine.submit([1, 2, 3], pyllm.SamplingParams(temperature=0), max_tokens=100)
    for _ in range(5):  # which also tells how long a step takes
        engine.step(LONG / 1e4)
    before = len(first.ids)
    engine.submit([5] * 100, max_tokens=4)
    if crowded:
        engine.submit([7] * 3, max_tokens=4)
    engine.step(LONG)
    assert (len(first.ids) > before + 1) == crowded
