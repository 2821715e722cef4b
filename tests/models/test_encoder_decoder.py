"""The encoder-decoder: one answer whatever way it is computed, training on pairs, generating."""

import pytest
import torch

import pyllm
from pyllm.engine import SamplingParams, generate_ids
from pyllm.models import Memory, Pair

POST_NORM = {"context_length": 40, "norm": "layer_norm", "post_norm": True, "bias": True}
MAKERS = {
    "t5": {"encoder_num_layers": 3, "head_dim": 5, "attention_scale": 1.0, "output_scale": 0.2, "max_distance": 17},
    "bart": POST_NORM | {"position": "learned", "position_offset": 2, "embedding_norm": True, "activation": "gelu",
                         "head_bias": True},
    "marian": POST_NORM | {"position": "sinusoidal", "embedding_scale": 5.0, "activation": "relu",
                           "encoder_num_heads": 2},
}  # fmt: skip


def make(kind, **settings):
    model = pyllm.EncoderDecoder(31, 24, 2, 4, **MAKERS[kind] | settings).eval()
    for parameter in model.parameters():  # as large as trained ones
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.5)
    return model


@pytest.fixture(params=MAKERS)
def model(request):
    return make(request.param)


SOURCES = torch.tensor([19, 6, 13])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_chunks_steps_and_padding_give_the_same_bits(model, dtype, threads):
    model.to(dtype)
    source, ids = torch.randint(31, (3, 19)), torch.randint(31, (3, 20))
    whole = model(Pair(source, ids, SOURCES))
    for n, chunks in ((1, [20]), (2, [1] * 20), (3, [7, 1, 12])):
        threads(n)
        state = model.new_state(3, 20, model.encode(source, SOURCES))
        assert torch.equal(torch.cat([model(part, state) for part in ids.split(chunks, 1)], 1), whole)
        assert state.lengths.tolist() == [20] * 3
    left = torch.stack([row.roll(19 - n) for row, n in zip(source, SOURCES.tolist(), strict=True)])
    mask = (torch.arange(19) >= 19 - SOURCES[:, None]).int()
    assert torch.equal(model(Pair(left, ids), attention_mask=mask), whole)
    for row, answer, n, logits in zip(source, ids, SOURCES.tolist(), whole, strict=True):
        assert torch.equal(model(Pair(row[None, :n], answer[None]))[0], logits)


@torch.no_grad()
def test_answers_of_several_lengths_go_on_from_their_own_ends(model):
    source, rows = torch.randint(31, (3, 19)), [torch.randint(31, (n,)) for n in (11, 1, 8)]
    lengths, step = torch.tensor([len(r) for r in rows]), torch.randint(31, (3, 2))
    state = model.new_state(3, 20, model.encode(source, SOURCES))
    together = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), state, lengths)
    after = model(step, state)
    for i, row in enumerate(rows):
        alone = model(Pair(source[i : i + 1, : SOURCES[i]], torch.cat((row, step[i]))[None]))[0]
        assert torch.equal(together[i, : len(row)], alone[:-2]) and torch.equal(after[i], alone[-2:])


@torch.no_grad()
def test_cross_attention_computes_its_keys_and_values_once(model):
    calls = []
    for block in model.decoder.blocks:
        block.cross_attention.kv.register_forward_hook(lambda *_: calls.append(1))
    list(generate_ids(model, [[4, 5, 6], [7, 8]], max_tokens=9))
    assert len(calls) == 2


def test_loss_is_the_cross_entropy_of_the_logits(model):
    source, targets = torch.randint(31, (3, 19)), torch.randint(31, (3, 8))
    targets[0, 2:] = -100
    pair = model.pair(source, targets, SOURCES)
    assert pair.ids[:, 0].tolist() == [0] * 3 and torch.equal(pair.ids[1:, 1:], targets[1:, :-1])
    loss = model.loss(pair, targets)
    expected = torch.nn.functional.cross_entropy(model(pair).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, list(model.parameters()), allow_unused=True) for x in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_it_learns_to_answer_and_is_saved(tmp_path):
    words = ["fox", "sea", "owl", "ice", "elk", "sun"]
    tokenizer = pyllm.Tokenizer.train("char", words)
    end = tokenizer.eos_id
    sources = torch.tensor([tokenizer.encode(w) for w in words])
    targets = torch.cat((sources.flip(1), torch.full((6, 1), end)), 1)
    model = pyllm.EncoderDecoder(tokenizer.vocab_size, 32, 1, 2, start_id=end)
    batches = [(model.pair(sources, targets), targets)] * 50
    history = pyllm.train(model, batches, torch.optim.Adam(model.parameters(), 0.02), folder=tmp_path / "run",
                          tokenizer=tokenizer, progress=False)  # fmt: skip
    assert history.losses[0] > 2 and history.losses[-1] < 0.1
    assert pyllm.test(model, batches[:1]).accuracy == 1
    again, tokenizer = pyllm.load(tmp_path / "run")
    assert again.config == model.config
    assert pyllm.generate(again, tokenizer, words, temperature=0) == [w[::-1] for w in words]
    assert "".join(pyllm.generate(again, tokenizer, "owl", temperature=0, stream=True)) == "lwo"


@torch.no_grad()
def test_ids_that_are_forced_and_suppressed():
    model = make("bart", forced_bos_id=5, forced_eos_id=2)
    prompts = [[4, 5, 6], [7, 8]]
    free = list(zip(*generate_ids(model, prompts, SamplingParams(temperature=0), max_tokens=8), strict=True))
    assert all(ids[0] == 5 and ids[-1] == 2 for ids in free)
    wanted = free[0][1]
    model = make("bart", suppressed_ids=[wanted, free[1][1]])
    sampled = generate_ids(model, prompts * 20, SamplingParams(temperature=2.0, seed=3), max_tokens=8)
    assert wanted not in {i for step in sampled for i in step}


def test_a_sampled_answer_does_not_depend_on_its_batch(model):
    params, prompts = SamplingParams(seed=7, repetition_penalty=1.2), [[4, 5, 6, 7], [7], [1] * 12]
    together = list(zip(*generate_ids(model, prompts, params, max_tokens=12), strict=True))
    for prompt, ids in zip(prompts, together, strict=True):
        assert [i for (i,) in generate_ids(model, [prompt], params, max_tokens=12)] == list(ids)


def test_errors(model):
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(TypeError, match="must get a Pair of source and ids, but got a Tensor"):
        model(ids)
    state = model.new_state(2, 3, model.encode(ids))
    with pytest.raises(TypeError, match="must get ids alone, as the state has the source, but got a Pair"):
        model(Pair(ids, ids), state)
    with pytest.raises(ValueError, match="the memory of its 2 sources, but got none"):
        model.new_state(2, 3)
    with pytest.raises(ValueError, match="the memory of its 2 sources, but got that of 1"):
        model.new_state(2, 3, Memory(torch.zeros(1, 3, 24)))
    with pytest.raises(ValueError, match="the state holds 3 positions"):
        model(torch.ones(2, 4, dtype=torch.int64), state)
    with pytest.raises(ValueError, match="lengths and attention_mask must not both be given"):
        model(Pair(ids, ids, torch.tensor([3, 3])), attention_mask=ids)
    with pytest.raises(IndexError, match="31"):
        model(Pair(ids + 30, ids))
    if model.context_length is None:
        with pytest.raises(ValueError, match="max_length must be given"):
            model.new_state(2, memory=model.encode(ids))
        assert len(list(generate_ids(model, [[1] * 300], max_tokens=2))) == 2
    else:
        with pytest.raises(ValueError, match="the model's context is 40 tokens, but got 41 ids"):
            model.encode(ids.new_ones(1, 41))
        with pytest.raises(ValueError, match="a prompt of 41 tokens and 1 more do not fit"):
            generate_ids(model, [[1] * 41])
        assert len(list(generate_ids(model, [[1] * 40], max_tokens=40))) == 40
        with pytest.raises(ValueError, match="a prompt of 40 tokens and 41 more do not fit"):
            generate_ids(model, [[1] * 40], max_tokens=41)


def test_settings_that_are_refused():
    with pytest.raises(ValueError, match="position must be 'relative', 'learned' or 'sinusoidal', but got 'rope'"):
        pyllm.EncoderDecoder(10, position="rope")
    with pytest.raises(ValueError, match="context_length must be given with position='learned'"):
        pyllm.EncoderDecoder(10, position="learned")
    with pytest.raises(ValueError, match="norm must be one of layer_norm"):
        pyllm.EncoderDecoder(10, norm="group_norm")
    with pytest.raises(ValueError, match=r"ids must be in \[0, 10\), but got 10"):
        pyllm.EncoderDecoder(10, pad_id=10)
