"""Beam search: transformers' beams on a trained model, and what must hold beside other requests."""

import itertools

import pytest
import torch

import pyllm
from pyllm.engine import generate_ids

DOT = 426  # a text's sentences are ended by it


@pytest.fixture(scope="module")
def stories(shared_data):
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "stories260K" / "hf"
    model, tokenizer = pyllm.load(folder)
    return model, tokenizer, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def theirs(model, prompt, num_beams, max_tokens, eos, **options):
    found = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                           num_beams=num_beams, num_return_sequences=num_beams, max_new_tokens=max_tokens,
                           do_sample=False, eos_token_id=eos, pad_token_id=0, return_dict_in_generate=True,
                           output_scores=True, **options)  # fmt: skip
    sequences = []
    for row in found.sequences[:, len(prompt) :].tolist():
        ended = [i for i, t in enumerate(row) if t in eos]
        sequences.append(row[: ended[0] + 1] if ended else row[:max_tokens])
    return sequences, found.sequences_scores


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize(("num_beams", "length_penalty"), [(2, 1.0), (4, 2.0), (5, -1.0)])
def test_beams_are_those_of_transformers(stories, num_beams, length_penalty, early_stopping):
    model, tokenizer, its = stories
    engine = pyllm.Engine(model, max_sequences=8)  # without a tokenizer: the same ids end both
    ended = 0
    for text, max_tokens in (("Once upon a time", 25), ("", 12)):
        prompt = tokenizer.encode(text) or [1]
        for eos in ([DOT], [DOT, 2, 429]):
            options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
            expected, scores = theirs(its, prompt, num_beams, max_tokens, eos, **options)
            found = engine.beam_search(prompt, num_beams, max_tokens=max_tokens, stop_ids=eos, **options)
            assert [b.ids for b in found] == expected
            torch.testing.assert_close(torch.tensor([b.score for b in found]), scores, atol=1e-4, rtol=1e-4)
            ended += sum(b.ids[-1] in eos for b in found)
            assert engine.pool.pages.available == engine.pool.pages.count
    assert ended


def test_texts_are_those_of_the_ids(stories):
    model, tokenizer, _ = stories
    for beam in pyllm.Engine(model, tokenizer).beam_search("Once upon", 3, max_tokens=20, stop_ids=[DOT]):
        assert "Once upon" + beam.text == tokenizer.decode(tokenizer.encode("Once upon")[1:] + beam.ids)


def new(kind):
    torch.manual_seed(3)
    if kind in ("llama", "window"):
        return pyllm.Decoder(12, 16, 2, 4, context_length=300, window=70 if kind == "window" else None).eval()
    return pyllm.LanguageModel(12, 16, 2, cell=kind).eval()


@pytest.mark.parametrize("kind", ["llama", "window", "lstm", "gru"])
def test_enough_beams_find_the_best_of_all(kind):
    model = new(kind)
    found = pyllm.Engine(model, max_sequences=11, num_pages=40).beam_search([3, 5], 11, max_tokens=2, stop_ids=[])
    every = torch.tensor([[3, 5, *more] for more in itertools.product(range(12), repeat=2)])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(every), -1)
    scores = (logprobs[:, 1].gather(1, every[:, 2:3]) + logprobs[:, 2].gather(1, every[:, 3:]))[:, 0] / 2
    best = scores.topk(11)
    assert [b.ids for b in found] == every[best.indices, 2:].tolist()
    torch.testing.assert_close(torch.tensor([b.score for b in found]), best.values)


@pytest.mark.parametrize("kind", ["llama", "window", "lstm"])
def test_beams_and_requests_do_not_disturb_each_other(kind):
    model, prompt, params = new(kind), [i * i % 12 for i in range(130)], pyllm.SamplingParams(seed=2)
    options = {"max_tokens": 30, "stop_ids": [3]}
    expected = pyllm.Engine(model, num_pages=40).beam_search(prompt, 3, **options)
    one = pyllm.Engine(model, num_pages=40).beam_search(prompt, 1, max_tokens=30)
    assert one[0].ids == [i for (i,) in generate_ids(model, [prompt], pyllm.SamplingParams(0), max_tokens=30)]
    alone = [i for (i,) in generate_ids(model, [prompt], params, max_tokens=40)]
    for chunk, pages in ((256, 12), (50, 9)):
        engine = pyllm.Engine(model, max_sequences=3, num_pages=pages, chunk=chunk)
        made = [engine.submit(prompt, params, max_tokens=40) for _ in range(2)]
        assert engine.beam_search(prompt, 3, **options) == expected
        while any(r.reason is None for r in made):
            engine.step()
        assert [r.ids for r in made] == [alone] * 2
        assert kind == "lstm" or engine.pool.pages.available == pages


def test_what_interrupts_a_search_leaves_nothing_behind(monkeypatch):
    model = new("llama")
    engine = pyllm.Engine(model)
    monkeypatch.setattr(engine.steps, "run", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        engine.beam_search([1, 2], 3, max_tokens=5)
    assert engine.pool.pages.available == engine.pool.pages.count
    with pytest.raises(IndexError):
        engine.beam_search([12, 1], 3, max_tokens=5)
    assert engine.pool.pages.available == engine.pool.pages.count


def test_settings_are_checked():
    engine = pyllm.Engine(new("llama"), max_sequences=20, num_pages=8)
    for message, options in (
        ("num_beams must be at least 1, but got 0", {"num_beams": 0}),
        ("True, False or 'never', but got 'always'", {"early_stopping": "always"}),
        ("length_penalty must be from -50 to 50, but got nan", {"length_penalty": float("nan")}),
        ("length_penalty must be from -50 to 50, but got -1000000.0", {"length_penalty": -1e6}),
        ("1 tokens and 300 more do not fit the model's context of 300", {"max_tokens": 300}),
        ("the pages must have room for 3 beams, but have it for 2", {"num_beams": 3, "max_tokens": 200}),
        ("the vocabulary must have room for 8 beams, but have it for 7", {"num_beams": 8, "stop_ids": range(5)}),
        ("the sequences must have room for 21 beams, but have it for 20", {"num_beams": 21}),
    ):
        with pytest.raises(ValueError, match=message):
            engine.beam_search([1], **{"max_tokens": 9, **options})


def test_generate_gives_the_best_and_a_checkpoint_s_settings_are_followed(stories):
    model, tokenizer, _ = stories
    engine = pyllm.Engine(model, tokenizer)
    texts = ["Once upon a time", "The"]
    for options in ({}, {"length_penalty": -2.0}, {"early_stopping": True}):
        best = [engine.beam_search(text, 3, max_tokens=12, **options)[0].text for text in texts]
        assert pyllm.generate(model, tokenizer, texts, num_beams=3, max_tokens=12, **options) == best
        assert pyllm.generate(model, tokenizer, texts[0], num_beams=3, max_tokens=12, **options) == best[0]
    asked = {"num_beams": 2, "length_penalty": -2.0, "early_stopping": True}
    given = engine.beam_search("The", max_tokens=12, **asked)
    assert len(engine.beam_search("The", max_tokens=12)) == 4
    model.unheeded = asked
    try:
        assert engine.beam_search("The", max_tokens=12) == given
        with pytest.warns(UserWarning, match="num_beams=2, length_penalty=-2.0.*Engine.beam_search searches for beams"):
            pyllm.generate(model, tokenizer, "The", max_tokens=1)
        model.unheeded = asked | {"length_penalty": "long"}
        with pytest.raises(ValueError, match="length_penalty must be a number, but got 'long'"):
            engine.beam_search("The")
        model.unheeded = {"num_beams": 2, "min_length": 3}
        with pytest.warns(UserWarning, match="asks for min_length=3 to generate, which is not done here$"):
            engine.beam_search("The", max_tokens=1)
    finally:
        model.unheeded = {}


def test_beams_draw_nothing(stories):
    model, tokenizer, _ = stories
    for options in ({"temperature": 0.5}, {"seed": 1}, {"stop": "."}, {"stream": True}):
        with pytest.raises(ValueError, match="without settings for drawing, stop texts and streaming"):
            pyllm.generate(model, tokenizer, "The", num_beams=2, **options)
    for options in ({"length_penalty": 2.0}, {"early_stopping": True}):
        with pytest.raises(ValueError, match="must be with num_beams of 2 or more"):
            pyllm.generate(model, tokenizer, "The", **options)
    with pytest.raises(ValueError, match="num_beams must be at least 1, but got 0"):
        pyllm.generate(model, tokenizer, "The", num_beams=0)
