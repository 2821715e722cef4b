"""Recorded steps of an engine: for each number of rows, whoever comes and goes."""

import random

import pytest
import torch

import pyllm
from pyllm.engine import generate_ids, recording, steps


def new(kind):
    torch.manual_seed(3)
    if kind == "llama":
        return pyllm.Decoder(40, 16, 2, 4, num_kv_heads=2, context_length=200).eval()
    if kind == "rwkv":
        return pyllm.RWKV(40, 24, 2, head_dim=8, decay_rank=4, rate_rank=5, value_rank=3, gate_rank=6).eval()
    return pyllm.LanguageModel(40, 16, 2, cell=kind).eval()


def alone(model, prompt, seed, max_tokens):
    params = pyllm.SamplingParams(seed=seed)
    return [i for (i,) in generate_ids(model, [prompt], params, max_tokens=max_tokens)]


@pytest.mark.parametrize("kind", ["llama", "lstm", "gru", "rwkv"])
def test_who_comes_and_goes_makes_no_new_recording(kind, monkeypatch):
    model, rng, recorded = new(kind), random.Random(0), []

    class Counted(recording.Recording):
        def __enter__(self):
            recorded.append(self)
            return super().__enter__()

    monkeypatch.setattr(steps, "Recording", Counted)
    asked = [([rng.randrange(40)] * rng.randrange(1, 9), i, rng.randrange(1, 30)) for i in range(40)]
    engine = pyllm.Engine(model, max_sequences=5, max_length=64)
    made = []
    for prompt, seed, max_tokens in asked:
        made.append(engine.submit(prompt, pyllm.SamplingParams(seed=seed), max_tokens=max_tokens))
        for _ in range(rng.randrange(4)):
            engine.step()
    while any(r.reason is None for r in made):
        engine.step()
    assert [r.ids for r in made] == [alone(model, *one) for one in asked]
    assert 1 < len(recorded) <= 5 and sorted(engine.steps.recorded) == list(range(1, len(recorded) + 1))


def test_recordings_with_the_same_memory_share_it():
    x, memory, made = torch.randn(6, 8), recording.Memory(), []
    for count in (3, 6, 2):
        with torch.no_grad(), recording.Recording(memory) as program:
            made.append((program, count, pyllm.ops.layer_norm(pyllm.ops.gelu(x[:count]))))
    assert len(memory.places) == 2 and memory.nbytes == 2 * x.nbytes
    assert {out.data_ptr() for _, _, out in made[1:]} == {memory.places[1].data_ptr()} != {made[0][2].data_ptr()}
    for program, count, out in made:
        program.run()
        with torch.no_grad():
            assert torch.equal(out, pyllm.ops.layer_norm(pyllm.ops.gelu(x[:count])))


def test_layers_share_what_they_need_for_themselves():
    x, expected, seen = torch.randn(6, 8), None, []
    for layers in (3, 30):
        memory = recording.Memory()
        with torch.no_grad(), recording.Recording(memory) as program:
            stream = x + 0
            for _ in range(layers):
                first, second = pyllm.ops.gelu(stream).split(4, -1)
                stream = stream + torch.cat([second, first], -1)  # views keep what they are of
        program.run()
        expected = x.clone()
        for _ in range(layers):
            first, second = pyllm.ops.gelu(expected).split(4, -1)
            expected = expected + torch.cat([second, first], -1)
        assert torch.equal(stream, expected)
        seen.append(memory.nbytes)
    assert seen[0] == seen[1] <= 4 * x.nbytes


@pytest.mark.parametrize("kind", ["llama", "lstm"])
@pytest.mark.parametrize("change", ["trained", "quantised", "put elsewhere", "quantised otherwise"])
def test_nothing_known_of_a_model_outlives_a_change_of_it(kind, change):
    model, prompt = new(kind), [i % 40 for i in range(70)]
    if change == "quantised otherwise":
        other = new(kind)
        torch.nn.utils.vector_to_parameters(torch.randn(model.num_parameters()) * 0.1, other.parameters())
        model.quantize("int8"), other.quantize("int8")
    engine = pyllm.Engine(model, max_length=128)
    params = pyllm.SamplingParams(seed=1)
    for _ in range(2):
        (found,) = engine.generate([prompt], params, max_tokens=20)
        assert found.ids == alone(model, prompt, 1, 20)
    before = found.logprobs
    if change == "quantised":
        model.quantize("int8")
    elif change == "quantised otherwise":
        layers = {k: v for k, v in other.state_dict().items() if k.startswith(("blocks", "rnn"))}
        quantised = {k: v for k, v in layers.items() if k.endswith((".panels", ".layout"))}
        model.load_state_dict(quantised, strict=False)
    elif change == "put elsewhere":
        vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        torch.nn.utils.vector_to_parameters(vector + 0.3 * torch.randn_like(vector), model.parameters())
    else:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    (found,) = engine.generate([prompt], params, max_tokens=20)
    (fresh,) = pyllm.Engine(model, max_length=128).generate([prompt], params, max_tokens=20)
    assert found.ids == alone(model, prompt, 1, 20) and found.logprobs == fresh.logprobs != before


def test_a_model_that_cannot_be_recorded_runs_as_it_is():
    model = new("llama")
    model.head.register_forward_hook(lambda module, args, logits: logits.softmax(-1))
    engine = pyllm.Engine(model, max_length=64)
    made = engine.generate([[1], [2, 3]], pyllm.SamplingParams(seed=5), max_tokens=9)
    assert [r.ids for r in made] == [alone(model, prompt, 5, 9) for prompt in ([1], [2, 3])]
    assert not engine.steps.recorded and not engine.steps.recordable
