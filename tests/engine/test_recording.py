import mmap
import signal
import sys

import pytest
import torch

import pyllm
from pyllm import _C, nn, ops
from pyllm.engine import generate_ids, why_unrecorded
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


def test_parameters_are_as_they_were_when_recorded():
    weight, x = torch.nn.Parameter(torch.randn(33, 70)), torch.randn(1, 70)
    for _ in range(2):
        program, out = recorded(lambda: ops.linear(x, weight))
        program.run()
        with torch.no_grad():
            assert torch.equal(out, ops.linear(x, weight))
            weight.mul_(-2)  # a new recording packs it again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_of_weights_have_room_or_stand_for_a_file_s_pages(dtype, tmp_path, monkeypatch):
    linear = sys.modules["pyllm.ops.linear"]
    shape, x = (256, 640), torch.randn(1, 640).to(dtype)
    values = torch.randn(shape).to(dtype)
    monkeypatch.setattr(linear, "_ROOM", values.nbytes)
    monkeypatch.setattr(linear, "_PART", values.nbytes // 3)
    linear._copies.clear()
    (tmp_path / "weight").write_bytes(values.view(torch.uint8).numpy().tobytes())
    with open(tmp_path / "weight", "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped = torch.frombuffer(pages, dtype=dtype).view(shape)
    mapped, own, another = (torch.nn.Parameter(t) for t in (mapped, values.clone(), values.clone()))
    for weight, copied in ((own, True), (another, False), (mapped, True)):
        program, out = recorded(lambda weight=weight: ops.linear(x, weight))
        assert (weight in linear._copies) == (copied and (dtype == torch.float32 or not _C.info()["amx"]))
        program.run()
        with torch.no_grad():
            assert torch.equal(out, ops.linear(x, values))
    assert torch.equal(mapped, values)  # its pages come back
    assert _C.give_back_file_pages(mapped.detach()) and _C.give_back_file_pages(mapped.detach().T)
    with torch.no_grad():
        mapped[3] = 0
    assert not _C.give_back_file_pages(mapped.detach())  # what was written is not in the file
    assert not mapped[3].any() and torch.equal(mapped[4:], values[4:])
    with monkeypatch.context() as unreadable:
        unreadable.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(OSError))
        assert linear._quarter(values.nbytes) == 0
    for room, fits in ((2 * values.nbytes, True), (2 * values.nbytes - 1, False)):  # of all copies together
        linear._copies.clear()
        linear._copies[mapped] = None, linear.pack_linear(mapped.detach())
        monkeypatch.setattr(linear, "_quarter", lambda held, room=room: room)
        assert linear._fits(mapped) == fits


def test_calls_read_the_copies_that_there_are_where_asked():
    linear = sys.modules["pyllm.ops.linear"]
    weight, x = torch.nn.Parameter(torch.randn(33, 70)), torch.randn(9, 70)
    recorded(lambda: ops.linear(x, weight))
    linear._copies[weight][1].panels.zero_()
    with torch.no_grad(), linear.reading_copies():
        assert not ops.linear(x, weight).any()
    with torch.no_grad():
        assert ops.linear(x, weight).any()
    with linear.reading_copies():
        assert ops.linear(x, weight).any()
        with torch.no_grad():
            weight.mul_(2)
            assert ops.linear(x, weight).any()


@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_ends_a_long_call_between_two_operations(count, threads):
    def ring(number, frame):
        raise InterruptedError("rung")

    x, weight, last = torch.randn(256, 1024), torch.randn(1024, 1024), torch.zeros(4)
    program, _ = recorded(lambda: ([ops.linear(x, weight) for _ in range(400)], last.add_(1)))
    before = signal.signal(signal.SIGALRM, ring)
    threads(count)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(InterruptedError, match="rung"):
            program.run()
        assert not last.any()
        program.run()
        assert last.all()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_what_recording_names_stays_alive():
    x = torch.randn(4, 8)
    program, out = recorded(lambda: ops.layer_norm(x, torch.ones(8)) * torch.full((8,), 2.0))
    for _ in range(20):
        torch.randn(4, 8)  # would lie where the ones and the norm's result did
    program.run()
    assert torch.equal(out, ops.layer_norm(x) * 2)
    assert program.ops.count("norm_forward") == 1 and set(program.ops) == {"norm_forward", "elementwise"}
    weight = torch.nn.Parameter(torch.randn(8))
    program, out = recorded(lambda: ops.layer_norm(x, weight))
    program.run()
    before, weight.data = out.clone(), torch.zeros(8)
    others = [torch.ones(8) for _ in range(20)]
    program.run()
    assert torch.equal(out, before) and len(others) == 20


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
    program.generate(None, [ids], [drawn], ended, [5], False)
    assert program.steps_done == 5 and drawn[:5].tolist() == [[1, 4], [2, 5], [3, 6], [4, 7], [5, 8]]
    assert ended.all()
    ids[:] = 0
    weight = torch.randn(3, 4)

    def step():
        ops.embedding(ids, weight)
        ids.copy_(ids + 1)

    program, _ = recorded(step)
    with pytest.raises(IndexError, match="embedding"):
        program.generate(None, [ids], [drawn], torch.zeros(2, dtype=torch.bool), [], False)
    assert (program.steps_done, program.steps_run) == (3, 3) and drawn[:3].tolist() == [[1, 1], [2, 2], [3, 3]]
    good, bad = ([ids], [drawn], ended), []
    bad += [([ids.int()], *good[1:]), ([ids], [drawn[:, :1]], ended), ([ids], [drawn], ended.int())]
    bad += [([], [], ended), ([ids, ids], [drawn], ended), ([ids, ids], [drawn, drawn.float()], ended)]
    for arguments in bad:
        with pytest.raises((ValueError, TypeError), match=r"\[Program.generate\]"):
            program.generate(None, *arguments, [], False)


def test_generate_draws_by_a_second_program_until_the_first_row_has_stopped():
    ids, twice = torch.tensor([0, 3]), torch.zeros(2)
    program, _ = recorded(lambda: twice.mul_(2))
    draw, _ = recorded(lambda: (ids.copy_(ids + 1), twice.copy_(twice + 1)))
    kept, ended = [torch.zeros(8, 2, dtype=torch.int64), torch.zeros(8, 2)], torch.zeros(2, dtype=torch.bool)
    program.generate(draw, [ids, twice], kept, ended, [6], True)
    assert (program.steps_done, program.steps_run) == (3, 3) and ended.tolist() == [False, True]
    assert kept[0][:3].tolist() == [[1, 4], [2, 5], [3, 6]] and kept[1][:3].tolist() == [[1, 1], [3, 3], [7, 7]]
    weight = torch.randn(9, 4)
    draw, _ = recorded(lambda: (ids.copy_(ids + 1), ops.embedding(ids, weight)))
    with pytest.raises(IndexError, match="embedding"):
        program.generate(draw, [ids, twice], kept, torch.zeros(2, dtype=torch.bool), [], True)
    assert (program.steps_done, program.steps_run) == (2, 3)


def decoder(**options):
    return pyllm.Decoder(40, 32, 2, 4, num_kv_heads=2, context_length=80, **options)


def encoder_decoder(**options):
    return pyllm.EncoderDecoder(40, 32, 2, 4, context_length=80, **options)


GPT2 = {"position": "learned", "norm": "layer_norm", "activation": "gelu", "bias": True, "qkv_bias": True}
GEMMA = {"norm": "one_plus_rms_norm", "post_norms": True, "attention_softcap": 5.0, "logit_softcap": 3.0, "window": 8,
         "window_layers": [0], "embedding_scale": 2.0, "activation": "geglu_tanh"}  # fmt: skip
MODELS = {
    "rnn": lambda: pyllm.LanguageModel(40, 16, 2, cell="rnn"),
    "gru": lambda: pyllm.LanguageModel(40, 16, 2, cell="gru"),
    "lstm": lambda: pyllm.LanguageModel(40, 16, 2, cell="lstm"),
    "llama": decoder,
    "llama in bfloat16": lambda: decoder().bfloat16(),
    "llama in 8 bits": lambda: quantised(decoder(), "int8"),
    "llama in 4 bits": lambda: quantised(decoder(), "int4"),
    "lstm in 8 bits": lambda: quantised(pyllm.LanguageModel(40, 16, 2, cell="lstm"), "int8"),
    "gru in 4 bits": lambda: quantised(pyllm.LanguageModel(40, 40, 2, cell="gru"), "int4"),
    "rnn in bfloat16 and 4 bits": lambda: quantised(pyllm.LanguageModel(40, 40, cell="rnn").bfloat16(), "int4-min"),
    "rwkv in 4 bits": lambda: quantised(pyllm.RWKV(40, 32, 2, head_dim=16), "int4"),
    "t5 in 8 bits": lambda: quantised(encoder_decoder(), "int8"),
    "gpt2": lambda: decoder(**GPT2),
    "gemma2": lambda: decoder(**GEMMA),
    "qwen3": lambda: decoder(head_norm=True),
    "bloom": lambda: decoder(position="alibi", embedding_norm=True),
    "neox": lambda: decoder(parallel_residual=True),
    "rwkv": lambda: pyllm.RWKV(40, 32, 2, head_dim=16),
    "t5": encoder_decoder,
    "bart": lambda: encoder_decoder(position="learned", post_norm=True, embedding_norm=True, bias=True),
    "marian": lambda: encoder_decoder(position="sinusoidal", forced_eos_id=3, suppressed_ids=[0]),
}


def quantised(model, weights):
    model.quantize(weights)
    return model


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request):
    return request.param().eval()


OPTIONS = [{}, {"temperature": 0}, {"top_p": 0.8, "min_p": 0.01}, {"repetition_penalty": 1.3}]


def test_recorded_and_unrecorded_generation_draw_the_same(model, monkeypatch):
    assert why_unrecorded(model) is None
    prompts = [[1, 2, 3], [4], [5, 6]]

    def drawn(options, threads=2):
        before = pyllm.num_threads()
        pyllm.set_num_threads(threads)
        try:
            params = pyllm.SamplingParams(seed=5, **options)
            return list(generate_ids(model, prompts, params, max_tokens=70, stop_ids=[7]))
        finally:
            pyllm.set_num_threads(before)

    def refuse():
        raise NotRecordable("not now")

    for options in OPTIONS:
        by_replay = drawn(options)
        assert by_replay == drawn(options, threads=1)
        with monkeypatch.context() as patch:
            patch.setattr("pyllm.engine.decoding.Recording", refuse)
            assert by_replay == drawn(options)


def test_logits_of_replays_are_those_of_the_whole_sequence(model):
    """What is drawn might hide a difference in bits."""
    ids = torch.randint(40, (2, 70))
    source, lengths = torch.randint(1, 40, (2, 5)), torch.tensor([5, 5])
    with torch.no_grad():
        whole = model(pyllm.models.Pair(source, ids) if model.answers else ids)
        state, _, _ = model.begin(source, lengths, 70)
        now = ids[:, :1].clone()
        with Recording() as program:
            logits = model.head(model.hidden(now, state)[:, 0])
        for step in range(70):
            now.copy_(ids[:, step : step + 1])
            program.run()
            assert torch.equal(logits, whole[:, step]), step


def test_a_model_with_foreign_operations_runs_unrecorded_and_says_why():
    model = decoder().train()
    model.head.register_forward_hook(lambda module, args, logits: logits.softmax(-1))
    assert "_softmax cannot be recorded" in why_unrecorded(model)
    assert model.training
    ids = [i for (i,) in generate_ids(model, [[1, 2]], pyllm.SamplingParams(temperature=0), max_tokens=9)]
    assert ids[0] == int(model.eval()(torch.tensor([[1, 2]]))[0, -1].argmax()) and len(ids) == 9


@pytest.mark.parametrize("quantised", [None, "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_of_experts_is_recorded_for_whichever_rows_come(dtype, quantised):
    model = decoder(num_experts=5, active_experts=2).to(dtype)
    if quantised:
        model.quantize(quantised)
    ids = torch.randint(40, (4, 30))
    assert why_unrecorded(model) is None
    with torch.no_grad():
        whole, state, now = model(ids), model.new_state(4, 30), ids[:, :1].clone()
        with Recording() as program:
            logits = model.head(model.hidden(now, state)[:, 0])
        for step in range(30):
            now.copy_(ids[:, step : step + 1])
            program.run()
            assert torch.equal(logits, whole[:, step]), step


def test_experts_must_keep_rows_apart():
    model = decoder(num_experts=2)
    model.blocks[0].feed_forward.experts[1] = torch.nn.Sequential(nn.RMSNorm(32), Turned())
    assert "an expert's rows in other than their first dimension cannot be recorded" in why_unrecorded(model)
    x, offsets = torch.zeros(2, 3), torch.tensor([0, 2])
    with pytest.raises(ValueError, match="a step must be recorded"):
        _C.begin_rows(offsets, 0, x, x)
    for arguments, message in (((offsets, 1, x, x), "at must be in"), ((offsets, 0, x, x[:1]), "out must have shape"),
                               ((offsets.float(), 0, x, x), "offsets must be int64")):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message), torch.no_grad(), Recording():
            _C.begin_rows(*arguments)


class Turned(torch.nn.Module):
    def forward(self, x):
        return ops.gelu(x.T.contiguous()).T.contiguous()


def test_a_row_that_is_not_finite_ends_generation_with_what_came_before():
    model = pyllm.LanguageModel(40, 16, 1, cell="gru").eval()
    params = pyllm.SamplingParams(temperature=0)
    expected = [i for (i,) in generate_ids(model, [[1]], params, max_tokens=30)]
    poisoned = expected[-1]
    first = expected.index(poisoned)
    model.embedding.weight.data[poisoned] = float("nan")
    steps, drawn = generate_ids(model, [[1]], params, max_tokens=30), []
    with pytest.raises(ValueError, match=r"\[sample\]"):
        for (i,) in steps:
            drawn.append(i)
    assert drawn == expected[: first + 1]
