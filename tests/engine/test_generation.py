import pytest
import torch

import pyllm
from pyllm.engine import generate_ids

TEXT = "the quick brown fox jumps over the lazy dog; 古池や蛙飛び込む水の音 🐸. " * 3


@pytest.fixture(scope="module", params=["lstm", "gpt", "gpt-bpe"])
def made(request):
    tokenizer = pyllm.Tokenizer.train("bpe:300" if "bpe" in request.param else "char", [TEXT])
    torch.manual_seed(3)
    if request.param == "lstm":
        model = pyllm.LanguageModel(tokenizer.vocab_size, 16, 2, cell="lstm")
    else:
        model = pyllm.Decoder(tokenizer.vocab_size, 16, 2, 2, context_length=64)
    return model, tokenizer


def test_greedy_is_the_argmax_of_the_full_forward(made):
    model, _ = made
    ids = [5, 3, 8]
    drawn = [i for (i,) in generate_ids(model, [ids], pyllm.SamplingParams(temperature=0), max_tokens=10)]
    for i in drawn:
        with torch.no_grad():
            assert i == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids = [*ids, i]


def test_each_of_a_batch_is_as_if_alone_and_streams_the_same(made):
    model, tokenizer = made
    prompts = ["the quick", "t", "", "the lazy dog; 古池"]
    options = {"max_tokens": 20, "temperature": 1.3, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 7}
    together = pyllm.generate(model, tokenizer, prompts, **options)
    for prompt, text in zip(prompts, together, strict=True):
        assert pyllm.generate(model, tokenizer, prompt, **options) == text
        assert "".join(pyllm.generate(model, tokenizer, prompt, stream=True, **options)) == text
    assert pyllm.generate(model, tokenizer, "t", **options | {"seed": 8}) != together[1]


def test_stop_text_ends_and_is_left_out(made):
    model, tokenizer = made
    options = {"max_tokens": 30, "seed": 1}
    text = pyllm.generate(model, tokenizer, "the ", **options)
    stop = text[5:8]
    expected = text[: text.index(stop)]
    for stops in (stop, [stop, "never in there"]):
        assert pyllm.generate(model, tokenizer, "the ", stop=stops, **options) == expected
        assert "".join(pyllm.generate(model, tokenizer, "the ", stop=stops, stream=True, **options)) == expected
    # a text that only begins like a stop text is not lost
    assert pyllm.generate(model, tokenizer, "the ", stop=text[-1] + "\0", **options) == text


def test_end_of_text_ends_one_and_not_the_others(made):
    model, _ = made
    steps = list(generate_ids(model, [[4], [5], [6]], pyllm.SamplingParams(seed=2), max_tokens=25))
    stop = steps[3][1]
    stopped = list(generate_ids(model, [[4], [5], [6]], pyllm.SamplingParams(seed=2), max_tokens=25, stop_ids=[stop]))
    for row in range(3):
        ids = [s[row] for s in steps]
        end = ids.index(stop) + 1 if stop in ids else len(ids)
        assert [s[row] for s in stopped] == (ids[:end] + [None] * 25)[: len(stopped)]


def test_generation_leaves_the_model_as_it_was(made):
    model, tokenizer = made
    model.train()
    frozen = next(iter(model.children())).eval()
    list(generate_ids(model, [[4]], max_tokens=2))
    assert model.training and not frozen.training
    pyllm.generate(model, tokenizer, "the", max_tokens=2)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_errors(made):
    model, tokenizer = made
    with pytest.raises(ValueError, match="max_tokens must be at least 1, but got 0"):
        pyllm.generate(model, tokenizer, "the", max_tokens=0)
    with pytest.raises(ValueError, match="top_p"):
        pyllm.generate(model, tokenizer, "the", max_tokens=1, top_p=1.5)
    with pytest.raises(ValueError, match="at least one id"):
        list(generate_ids(model, [[]]))
    with pytest.raises(ValueError, match="stream=True takes one prompt"):
        pyllm.generate(model, tokenizer, ["a", "b"], stream=True)
    with pytest.raises(ValueError, match="stop text must not be empty"):
        pyllm.generate(model, tokenizer, "a", stop="")
    if model.context_length:
        with pytest.raises(ValueError, match="do not fit the model's context of 64"):
            pyllm.generate(model, tokenizer, "the quick brown", max_tokens=64)
        assert pyllm.generate(model, tokenizer, "the", seed=1)
