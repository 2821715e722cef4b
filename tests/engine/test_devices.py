"""Engines of models that are not on the CPU, and steps that are captured as CUDA graphs, without a GPU."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyllm
from pyllm.engine import generate_ids
from pyllm.engine.capture import Captured
from pyllm.engine.decoding import _captured
from pyllm.engine.recording import NotRecordable, Recording
from pyllm.engine.sampling import Sampler


@pytest.mark.parametrize("kind", ["decoder", "answers", "sinusoidal", "lstm", "rwkv"])
def test_every_tensor_is_where_the_model_is(kind):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("elsewhere.py"), kind],
        env=os.environ | {"PYLLM_REFERENCE": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


class Graph:
    """In place of torch's: what is captured is recorded, and computed by a replay alone."""

    replays = 0

    def __init__(self):
        self.recording = Recording()

    def replay(self):
        Graph.replays += 1
        self.program.run()


CPU = torch.device("cpu")
current = []  # device, stream and handle: what a capture makes current, as long as it lasts


@contextlib.contextmanager
def as_current(what):
    before = list(current)
    current.append(what)
    try:
        yield
    finally:
        current[:] = before


@contextlib.contextmanager
def graph(made, pool, stream, capture_error_mode):
    assert (pool, stream[0], capture_error_mode) == ("pool", "stream", "thread_local")
    assert current == [stream[1], stream, "handle"]
    with made.recording as made.program:
        yield


@pytest.fixture
def graphs(monkeypatch):
    current.clear()
    for name, fake in {
        "CUDAGraph": Graph, "graph": graph, "graph_pool_handle": lambda: "pool", "device": as_current,
        "stream": as_current, "Stream": lambda device: ("stream", device),
        "current_blas_handle": lambda: current.append("handle"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Graph, "replays", 0)


def new():
    torch.manual_seed(0)
    return pyllm.Decoder(40, 16, 2, 4, context_length=64).eval()


@torch.no_grad()
def test_a_captured_step_is_computed_when_it_is_replayed(graphs):
    x, memory = torch.randn(3, 8), []
    captured = Captured(lambda: pyllm.ops.gelu(x), memory, CPU)
    assert memory == ["pool", ("stream", CPU)] and not current
    for _ in range(2):
        x.normal_()
        captured.run()
        assert torch.equal(captured.out, pyllm.ops.gelu(x))


@torch.no_grad()
def test_what_no_graph_can_hold_says_why(graphs):
    with pytest.raises(NotRecordable, match="waits for the device cannot be a CUDA graph: a step must not read a"):
        Captured(lambda: torch.empty(int(torch.empty(1))), [], CPU)
    assert not current

    def exhausted():
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        Captured(exhausted, [], CPU)
    with torch.enable_grad(), pytest.raises(NotRecordable, match="without gradients"):
        Captured(lambda: torch.ones(2), [], CPU)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 7])
def test_generating_by_graphs_draws_the_same(count, graphs):
    model, params = new(), pyllm.SamplingParams(seed=3, repetition_penalty=1.2)
    expected = list(generate_ids(model, [[1, 2], [3, 4]], params, max_tokens=count + 1))
    sample, state = Sampler(params, [[1, 2], [3, 4]]), model.new_state(2, 20)
    drawn = sample(model(torch.tensor([[1, 2], [3, 4]]), state)[:, -1])
    rest = list(_captured(model, state, sample, torch.tensor(drawn)[:, None], count + 1))
    assert [drawn, *rest] == expected
    assert Graph.replays == max(0, count - 1)


@torch.no_grad()
def test_an_engine_captures_a_step_for_each_number_of_rows(graphs):
    prompts, params = [[1, 2, 3], [4], [5] * 9], [pyllm.SamplingParams(seed=i) for i in range(3)]
    expected = [r.ids for r in pyllm.Engine(new(), max_length=32).generate(prompts, params, max_tokens=6)]

    class OnCuda:  # ids that say that they are there
        is_cuda, device = True, torch.device("cuda")

        def __init__(self, ids):
            self.ids = ids

        def __getitem__(self, rows):
            return self.ids[rows]

        def __setitem__(self, rows, ids):
            self.ids[rows] = ids

    engine = pyllm.Engine(new(), max_length=32)
    engine.steps.ids = OnCuda(engine.steps.ids.clone())
    assert [r.ids for r in engine.generate(prompts, params, max_tokens=6)] == expected
    assert Graph.replays and engine.steps.graphs == ["pool", ("stream", OnCuda.device)]
