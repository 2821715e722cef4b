"""What is streamed adds up, byte for byte, to what is not."""

import asyncio

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyllm

TEXT = "the quick brown fox jumps over the lazy dog; 古池や蛙飛び込む水の音 🐸. " * 3
PROMPTS = st.sampled_from(["the ", "古池", "", "🐸", "t"])


@pytest.fixture(scope="module", params=["bpe:300", "char", "sentencepiece"])
def made(request):
    if request.param == "sentencepiece":
        folder = request.getfixturevalue("shared_data") / "stories260K"
        tokenizer = pyllm.Tokenizer.load(folder / "tok512.model")
    else:
        tokenizer = pyllm.Tokenizer.train(request.param, [TEXT])
    torch.manual_seed(3)
    model = pyllm.LanguageModel(tokenizer.vocab_size, 16, 1)
    threads = pyllm.num_threads()
    pyllm.set_num_threads(1)
    yield model, tokenizer, pyllm.Engine(model, tokenizer, max_sequences=4, chunk=2)
    pyllm.set_num_threads(threads)


@settings(max_examples=60)
@given(data=st.data(), prompt=PROMPTS, seed=st.integers(0, 50), count=st.integers(1, 40))
def test_streamed_or_not_with_stops_and_characters_in_pieces(made, data, prompt, seed, count):
    model, tokenizer, engine = made
    params, options = pyllm.SamplingParams(seed=seed), {"max_tokens": count}
    (plain,) = engine.generate([prompt], params, **options)
    whole = plain.text
    inside = st.integers(0, max(len(whole) - 1, 0)).flatmap(
        lambda at: st.integers(1, 6).map(lambda n: whole[at : at + n]))  # fmt: skip
    stops = data.draw(st.lists(st.one_of(inside, st.text(min_size=1, max_size=3)).filter(bool), max_size=3))
    heard = []
    request = engine.submit(prompt, params, stop=stops, on_token=lambda i, piece: heard.append(piece), **options)
    neighbour = engine.submit("the ", pyllm.SamplingParams(seed=seed + 1), **options)
    pieces = list(engine.stream(prompt, params, stop=stops, **options))
    while request.reason is None or neighbour.reason is None:
        engine.step()
    (together,) = engine.generate([prompt], params, stop=stops, **options)
    plain_loop = pyllm.generate(model, tokenizer, prompt, seed=seed, stop=stops, stream=True, **options)
    text = together.text
    assert text == request.text == "".join(pieces) == "".join(plain_loop) and all(pieces)
    assert text.encode() == pyllm.generate(model, tokenizer, prompt, seed=seed, stop=stops, **options).encode()
    assert text.startswith("".join(heard))
    assert not any(stop in text for stop in stops)
    if any(stop in whole for stop in stops):
        assert any(whole.startswith(text + stop) for stop in stops)
    else:
        assert text == whole and together.ids == plain.ids
    assert plain.ids[: len(together.ids)] == together.ids


def test_a_cancelled_task_ends_its_request_alone():
    torch.manual_seed(3)
    tokenizer = pyllm.Tokenizer.train("char", [TEXT])
    engine = pyllm.Engine(pyllm.LanguageModel(tokenizer.vocab_size, 16, 1), tokenizer, max_sequences=3)
    params, heard = [pyllm.SamplingParams(seed=s) for s in range(3)], []
    (expected,) = engine.generate(["the "], params[0], max_tokens=400)

    async def listen(own, most):
        async for piece in engine.astream("the ", own, max_tokens=most):
            heard.append(piece)

    async def run():
        texts = []
        left = [asyncio.create_task(listen(own, 100_000)) for own in params[1:]]
        async for piece in engine.astream("the ", params[0], max_tokens=400):
            texts.append(piece)
            if heard and left:
                left.pop().cancel()
        await asyncio.gather(*left, return_exceptions=True)
        return "".join(texts)

    assert asyncio.run(run()) == expected.text
    assert engine.pool.free == 3 and not engine._running and not engine._waiting
