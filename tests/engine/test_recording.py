import pytest
import torch

import pyllm
from pyllm import ops
from pyllm.engine import generate_ids
from pyllm.engine.recording import NotRecordable, Recording


def recorded(step):
    with torch.no_grad(), Recording() as program:
        out = step()
    return program, out


STEPS = {
    "x + 2 * y": lambda x, y: x + 2 * y,
    "(x - y) / 3": lambda x, y: (x - y) / 3,
    "cat": lambda x, y: torch.cat((x, y[:2]), 0),
    "relu of a transposed copy": lambda x, y: torch.relu(x.T.contiguous()),
    "to bfloat16 and back": lambda x, y: (x.bfloat16() * 0.3).float() + y,
    "in place": lambda x, y: x.clone().mul_(y).add_(1),
    "constants": lambda x, y: x * torch.arange(5, dtype=torch.float32) + torch.tensor(0.25),
    "operations": lambda x, y: ops.linear(ops.gelu(x), y),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_replay_reads_memory_anew_and_gives_the_same_bits(step):
    x, y = torch.randn(3, 5), torch.randn(3, 5)
    program, out = recorded(lambda: step(x, y))
    for _ in range(3):
        x.normal_(), y.normal_()
        program.run()
        with torch.no_grad():
            assert torch.equal(out, step(x, y))


def test_what_recording_names_stays_alive():
    x = torch.randn(4, 8)
    program, out = recorded(lambda: ops.layer_norm(x, torch.ones(8)) * torch.full((8,), 2.0))
    for _ in range(20):
        torch.randn(4, 8)  # would lie where the ones and the norm's result did
    program.run()
    assert torch.equal(out, ops.layer_norm(x) * 2)
    assert program.ops.count("norm_forward") == 1 and set(program.ops) == {"norm_forward", "elementwise"}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda x: torch.softmax(x, -1), "_softmax.* cannot be recorded: use an operation of pyllm.ops"),
        (lambda x: x * int(x.sum().long()), "cannot be recorded"),
        (lambda x: x[0, 0].item(), "must not read a tensor's value"),
        (lambda x: torch.add(x, x, alpha=3), "alpha=3"),
        (lambda x: x.double(), "copy from torch.float32 to torch.float64"),
        (lambda x: x + torch.ones(5, dtype=torch.float64), "cannot be recorded"),
    ],
)
def test_what_cannot_be_recorded_is_named_and_changes_nothing(step, message):
    x = torch.randn(3, 5)
    before = x.clone()
    with pytest.raises(NotRecordable, match=message):
        recorded(lambda: step(x.add_(1)))
    assert torch.equal(x, before)
    assert torch.equal(ops.relu_squared(x), torch.relu(x) ** 2)  # operations run again


def test_gradients_are_not_recorded():
    with pytest.raises(NotRecordable, match="without gradients"), Recording():
        pass


def test_a_replay_checks_its_arguments_again():
    ids, weight = torch.tensor([1, 2]), torch.randn(5, 4)
    program, out = recorded(lambda: ops.embedding(ids, weight))
    program.run()
    ids[1] = 5
    with pytest.raises(IndexError, match=r"\[embedding\] ids\[1\] must be in \[0, 5\), but got 5"):
        program.run()
    ids[1] = 4
    program.run()
    assert torch.equal(out, weight[[1, 4]])


def test_any_number_of_threads_replays(threads):
    x, weight = torch.randn(64, 300), torch.randn(500, 300)
    program, out = recorded(lambda: ops.linear(ops.silu(ops.linear(x, weight)), weight.T.contiguous()))
    expected = ops.linear(ops.silu(ops.linear(x, weight)), weight.T.contiguous())
    for n in (1, 2, 5, 2):
        threads(n)
        for _ in range(3):
            out.zero_()
            program.run()
            assert torch.equal(out, expected)
        assert torch.equal(torch.mm(x, weight.T), torch.mm(x, weight.T))  # torch's team is as it was


def test_generate_stops_where_each_row_has_and_keeps_what_came_before_an_error():
    ids = torch.tensor([0, 3])
    program, _ = recorded(lambda: ids.copy_(ids + 1))
    drawn, ended = torch.zeros(8, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    program.generate(ids, drawn, ended, [5])
    assert program.steps_done == 5 and drawn[:5].tolist() == [[1, 4], [2, 5], [3, 6], [4, 7], [5, 8]]
    assert ended.all()
    ids[:] = 0
    weight = torch.randn(3, 4)

    def step():
        ops.embedding(ids, weight)
        ids.copy_(ids + 1)

    program, _ = recorded(step)
    with pytest.raises(IndexError, match="embedding"):
        program.generate(ids, drawn, torch.zeros(2, dtype=torch.bool), [])
    assert program.steps_done == 3 and drawn[:3].tolist() == [[1, 1], [2, 2], [3, 3]]
    for bad in ((ids.int(), drawn, ended), (ids, drawn[:, :1], ended), (ids, drawn, ended.int())):
        with pytest.raises((ValueError, TypeError), match=r"\[Program.generate\]"):
            program.generate(*bad, [])


@pytest.fixture(params=["rnn", "gru", "lstm"])
def model(request):
    return pyllm.LanguageModel(40, 16, 2, cell=request.param).eval()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0}, {"top_p": 0.8, "min_p": 0.01}, {"repetition_penalty": 1.3}]
)
def test_recorded_and_unrecorded_generation_draw_the_same(model, options, monkeypatch):
    params = pyllm.SamplingParams(seed=5, **options)
    prompts = [[1, 2, 3], [4], [5, 6]]

    def drawn():
        return list(generate_ids(model, prompts, params, max_tokens=40, stop_ids=[7]))

    replayed = []
    monkeypatch.setattr("pyllm.engine.decoding.Recording", lambda: replayed.append(1) or Recording())
    by_replay = drawn()
    assert replayed

    def refuse():
        raise NotRecordable("not now")

    monkeypatch.setattr("pyllm.engine.decoding.Recording", refuse)
    assert by_replay == drawn()
