import pytest
import torch

import pyllm
from pyllm.engine.recording import Recording
from pyllm.models import MODELS


def rwkv(**options):
    """As it begins, RWKV adds nothing to its stream: here all of its weights are moved."""
    model = pyllm.RWKV(31, 24, 2, head_dim=8, decay_rank=4, rate_rank=5, value_rank=3, gate_rank=6, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


MAKERS = {
    "rnn": lambda: pyllm.LanguageModel(31, 24, 2, cell="rnn"),
    "gru": lambda: pyllm.LanguageModel(31, 24, 1, cell="gru"),
    "lstm": lambda: pyllm.LanguageModel(31, 24, 2, cell="lstm", embedding_size=10),
    "gpt": lambda: pyllm.Decoder(31, 24, 2, 4, num_kv_heads=2, context_length=40),
    "gpt2": lambda: pyllm.Decoder(31, 24, 2, 4, context_length=40, position="learned", norm="layer_norm",
                                  activation="gelu", bias=True, qkv_bias=True, tie_embeddings=False),
    "rwkv": rwkv,
    "rwkv, tied": lambda: rwkv(tie_embeddings=True, embedding_norm=False, norm_bias=False),
}  # fmt: skip


@pytest.fixture(params=MAKERS)
def model(request):
    return MAKERS[request.param]().eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 12], [19, 1]])
def test_whole_sequence_chunks_and_steps_give_the_same_bits(model, chunks, dtype):
    model.to(dtype)
    ids = torch.randint(31, (3, 20))
    whole = model(ids)
    state = model.new_state(3, 20)
    assert torch.equal(torch.cat([model(part, state) for part in ids.split(chunks, 1)], 1), whole)
    assert state.lengths.tolist() == [20] * 3


@torch.no_grad()
def test_a_sequence_does_not_depend_on_its_batch_or_padding(model, threads):
    rows = [torch.randint(31, (n,)) for n in (20, 3, 11, 1)]
    alone = []
    for row in rows:
        alone.append(model(row[None])[0])
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7)
    lengths = torch.tensor([len(r) for r in rows])
    for n in (1, 2, 3):
        threads(n)
        state = model.new_state(4, 30)
        together = model(padded, state, lengths)
        for row, expected, found in zip(rows, alone, together, strict=True):
            assert torch.equal(found[: len(row)], expected)
        assert torch.equal(state.lengths, lengths)
        # and they go on from their own ends
        step = torch.randint(31, (4, 1))
        after = model(step, state)
        for row, s, found in zip(rows, step, after, strict=True):
            assert torch.equal(found, model(torch.cat((row, s))[None])[0, -1:])


@pytest.mark.parametrize(
    "options",
    [{}, {"position": "learned", "norm": "layer_norm", "bias": True}, {"position": "alibi", "embedding_norm": True},
     {"head_norm": True, "window": 9, "attention_softcap": 5.0, "logit_softcap": 3.0, "embedding_scale": 3.0}],
)  # fmt: skip
def test_a_decoders_step_is_recorded_and_reads_lengths_from_memory(options):
    model = pyllm.Decoder(31, 24, 2, 4, num_kv_heads=2, context_length=150, **options).eval()
    prompt, ids = torch.randint(31, (3, 61)), torch.randint(31, (3, 1))
    with torch.no_grad():
        states = [model.new_state(3, 66) for _ in range(2)]
        for state in states:
            model(prompt, state, torch.tensor([61, 1, 60]))
        with Recording() as program:
            logits = model(ids, states[0])
        for _ in range(5):
            ids.random_(31)
            program.run()
            assert torch.equal(logits, model(ids, states[1]))
        assert torch.equal(states[0].lengths, states[1].lengths)
        with pytest.raises(ValueError, match="holds 66 positions, but got 1 tokens after 66, in row 0"):
            program.run()


def test_loss_is_the_cross_entropy_of_the_logits(model):
    ids = torch.randint(31, (3, 8))
    targets = torch.randint(31, (3, 8))
    targets[0, 2:] = -100
    loss = model.loss(ids, targets)
    expected = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, list(model.parameters())) for x in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_config_makes_the_model_again(model):
    again = MODELS[model.model_type](**model.config)
    again.load_state_dict(model.state_dict())
    ids = torch.randint(31, (2, 5))
    assert torch.equal(again.eval()(ids), model(ids))


def test_errors():
    with pytest.raises(ValueError, match="cell must be one of rnn, gru, lstm, but got 'elman'"):
        pyllm.LanguageModel(10, cell="elman")
    with pytest.raises(ValueError, match="multiple of head_dim, but got 24 and 10"):
        pyllm.RWKV(10, 24, head_dim=10)
    with pytest.raises(ValueError, match="position must be"):
        pyllm.Decoder(10, position="absolute")
    with pytest.raises(ValueError, match="norm must be one of"):
        pyllm.Decoder(10, norm="batch")
    model = MAKERS["gpt"]()
    with pytest.raises(ValueError, match="context is 40 tokens, but got 41 ids"):
        model(torch.zeros(1, 41, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"has no gradients.*torch.no_grad"):
        model(torch.zeros(1, 4, dtype=torch.int64), model.new_state(1))
    with torch.no_grad():
        for capacity, reason in ((5, r"make it longer with new_state"), (40, "the model's context is 40 tokens")):
            state = model.new_state(1, capacity)
            model(torch.zeros(1, capacity - 1, dtype=torch.int64), state)
            with pytest.raises(
                ValueError, match=f"{capacity} positions, but got 2 tokens after {capacity - 1}.*{reason}"
            ):
                model(torch.zeros(1, 2, dtype=torch.int64), state)
            assert state.lengths.tolist() == [capacity - 1]
    with pytest.raises(IndexError, match="31"):
        model(torch.full((1, 1), 31))
