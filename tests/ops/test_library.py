"""The operations as torch.library has them: in compiled and exported graphs, with gradients."""

import inspect
import os
import subprocess
import sys

import pytest
import torch

import pyllm
from pyllm import ops
from pyllm.ops import library


def randn(*shape):
    return torch.randn(*shape, requires_grad=True)


def parameters(gates, hidden, inputs=5):
    """w_ih, w_hh, b_ih, b_hh"""
    return [randn(gates * hidden, n) for n in (inputs, hidden)] + [randn(gates * hidden) for _ in range(2)]


ids = torch.tensor([[1, 0, 3], [2, 2, 4]])
CALLS = {
    "attention": [
        lambda: ((randn(2, 3, 4, 8), randn(2, 5, 2, 8), randn(2, 5, 2, 8)), {"causal": True, "return_weights": True}),
        lambda: (
            (randn(2, 3, 2, 8), randn(2, 3, 2, 8), randn(2, 3, 2, 8)),
            {"bias": randn(2, 3, 3), "key_lengths": torch.tensor([2, 3]), "segment_ids": ids},
        ),
        lambda: ((randn(2, 3, 2, 8), randn(2, 3, 2, 8), randn(2, 3, 2, 8)), {"segment_ids": (ids, ids), "window": 2}),
        lambda: (
            (torch.randn(2, 3, 2, 8), torch.randn(3, 64, 1, 8), torch.randn(3, 64, 1, 8)),
            {
                "page_table": torch.tensor([[2, 0], [1, 1]]).int(),
                "key_lengths": torch.tensor([70, 9]),
                "return_weights": True,
            },
        ),
    ],
    "cross_entropy": [
        lambda: ((randn(6, 5), ids.flatten()), {}),
        lambda: ((randn(6, 5), ids.flatten()), {"reduction": "none"}),
    ],
    "embedding": [lambda: ((ids, randn(5, 4)), {})],
    "geglu": [lambda: ((randn(3, 8), randn(3, 8)), {"approximate": "tanh"})],
    "gelu": [lambda: ((randn(3, 8),), {})],
    "gru": [lambda: ((randn(2, 3, 5), parameters(3, 4)), {})],
    "gru_cell": [lambda: ((randn(2, 5), randn(2, 4), *parameters(3, 4)), {})],
    "layer_norm": [
        lambda: ((randn(3, 8), randn(8), randn(8)), {}),
        lambda: ((randn(3, 8),), {"residual": randn(3, 8)}),
    ],
    "linear": [lambda: ((randn(2, 3, 8), randn(5, 8), randn(5)), {}), lambda: ((randn(8), randn(5, 8)), {})],
    "linear_cross_entropy": [lambda: ((randn(6, 8), randn(5, 8), ids.flatten()), {"label_smoothing": 0.1})],
    "lstm": [
        lambda: ((randn(2, 3, 5), parameters(4, 4)), {"lengths": torch.tensor([3, 1])}),
        lambda: ((randn(2, 3, 5), parameters(4, 4), (randn(1, 3, 4), randn(1, 3, 4))), {"batch_first": False}),
    ],
    "lstm_cell": [lambda: ((randn(2, 5), (randn(2, 4), randn(2, 4)), *parameters(4, 4)), {})],
    "next_positions": [lambda: ((torch.tensor([3, 5]), 2, 9), {})],
    "relu_squared": [lambda: ((randn(3, 8),), {})],
    "rms_norm": [lambda: ((randn(3, 8), randn(8)), {"eps": 1e-5})],
    "rnn": [
        lambda: (
            (randn(2, 3, 5), [*parameters(1, 4), *parameters(1, 4), *parameters(1, 4, 8), *parameters(1, 4, 8)]),
            {"num_layers": 2, "bidirectional": True, "nonlinearity": "relu"},
        )
    ],
    "rnn_cell": [lambda: ((randn(2, 5), randn(2, 4), *parameters(1, 4)), {})],
    "rope": [lambda: ((randn(2, 3, 2, 8), torch.arange(3)), {})],
    "route": [
        lambda: ((randn(5, 4),), {"active": 2}),
        lambda: ((randn(5, 4),), {"active": 3, "normalised": False}),
    ],
    "sample": [
        lambda: ((torch.randn(3, 50),), {"seeds": 1, "positions": torch.arange(3), "temperature": 0.7, "top_p": 0.9})
    ],
    "sigmoid": [lambda: ((randn(3, 8),), {})],
    "silu": [lambda: ((randn(3, 8),), {})],
    "swiglu": [lambda: ((randn(3, 8), randn(3, 8)), {})],
    "tanh": [lambda: ((randn(3, 8),), {})],
    "wkv": [
        lambda: ((*(randn(2, 3, 2, 4) for _ in range(6)), randn(2, 2, 4, 4)), {"lengths": torch.tensor([3, 1])}),
        lambda: (tuple(randn(2, 3, 2, 4) for _ in range(6)), {}),
    ],
}
OPS = (
    {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    - {"pack_linear", "pack_quantized"}
    - {
        "quantized_embedding",
        "quantized_linear",
    }  # of packed weights: tests below
    - library.EAGER
)
EACH = [(name, i) for name in sorted(OPS) for i in range(len(CALLS[name]))]


def flat(out):
    return [out] if isinstance(out, torch.Tensor) else [t for part in out for t in flat(part)]


def leaves(args, kwargs):
    return [t for t in library._tensors([*args, *kwargs.values()]) if t.requires_grad]


def gradients(out, inputs):
    total = sum(t.sin().sum() for t in flat(out) if t.requires_grad)
    return torch.autograd.grad(total, inputs) if inputs else ()


def test_every_op_is_registered_and_tried_here():
    assert library.SHAPES.keys() & CALLS.keys() >= OPS
    for name in OPS:
        assert hasattr(torch.ops.pyllm, name) and hasattr(torch.ops.pyllm, f"{name}_backward")


@pytest.mark.parametrize(("name", "i"), EACH)
def test_a_compiled_graph_gives_the_same(name, i):
    args, kwargs = CALLS[name][i]()
    op = getattr(ops, name)
    torch.compiler.reset()
    compiled = torch.compile(lambda a, k: op(*a, **k), fullgraph=True, backend="aot_eager")
    expected, out = op(*args, **kwargs), compiled(args, kwargs)
    assert type(out) is type(expected)
    for a, b in zip(flat(out), flat(expected), strict=True):
        assert torch.equal(a, b)
    inputs = leaves(args, kwargs)
    for a, b in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "i"), EACH)
def test_an_exported_program_holds_the_op(name, i):
    args, kwargs = CALLS[name][i]()

    class Model(torch.nn.Module):
        def forward(self, args, kwargs):
            return getattr(ops, name)(*args, **kwargs)

    with torch.no_grad():
        program = torch.export.export(Model(), (args, kwargs))
        targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert getattr(torch.ops.pyllm, name).default in targets
        for a, b in zip(flat(program.module()(args, kwargs)), flat(getattr(ops, name)(*args, **kwargs)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "i"), EACH)
def test_opcheck(name, i, monkeypatch):
    """On the very arguments that the op gets from its function."""
    args, kwargs = CALLS[name][i]()
    seen = []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    packet = getattr(torch.ops.pyllm, name).default
    record = library._to_schema
    monkeypatch.setattr(library, "_to_schema", lambda kind, value: seen.append(record(kind, value)) or seen[-1])
    getattr(ops, name)(*args, **kwargs)
    monkeypatch.undo()
    torch.library.opcheck(packet, tuple(seen))


def quantized(n=5, k=8):
    values = torch.randint(0, 256, (n, 32 * -(-k // 32)), dtype=torch.uint8)
    return ops.pack_quantized(ops.QuantizedWeight(values, torch.rand(n, -(-k // 32)), None, 8, (n, k)))


def test_a_quantised_model_is_one_graph():
    weight, x, bias = quantized(), randn(2, 8), randn(5)

    def step(x, ids, bias):
        return ops.quantized_linear(x + ops.quantized_embedding(ids, weight), weight, bias) * 2

    ids = torch.tensor([1, 4])
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, out = step(x, ids, bias), compiled(x, ids, bias)
    assert torch.equal(out, expected)
    for a, b in zip(*(gradients(o, [x, bias]) for o in (out, expected)), strict=True):
        assert torch.equal(a, b)


def test_opcheck_of_packed_weights():
    weight = quantized()
    numbers = [int(n) for n in (*weight.layout, *weight.shape)]
    x, bias = randn(2, 3, 8), randn(5)
    torch.library.opcheck(torch.ops.pyllm.quantized_linear.default, (x, weight.panels, numbers, bias))
    torch.library.opcheck(torch.ops.pyllm.quantized_linear.default, (x, weight.panels, numbers, None))
    some = torch.tensor([[0, 4]])
    torch.library.opcheck(torch.ops.pyllm.quantized_embedding.default, (some, weight.panels, numbers, torch.bfloat16))


def test_the_environment_takes_the_twins(tmp_path):
    code = (
        "from pyllm import ops, reference; print(ops.REFERENCE, all(getattr(ops, n) is getattr(reference, n) for n in "
    )
    code += "ops.__all__ if hasattr(reference, n)))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYLLM_REFERENCE": "1"}, capture_output=True, cwd=tmp_path
    )  # not where the sources are: they shadow what is installed
    assert done.stdout.split() == [b"True", b"True"], done.stderr
    assert not ops.REFERENCE


QUANTISED = """
import sys, torch, pyllm
torch.manual_seed(0)
model, ids = pyllm.Decoder(64, 32, 1, 2, context_length=32), torch.arange(9)[None]
loaded, _ = pyllm.load(sys.argv[1])
torch.testing.assert_close(loaded(ids), torch.load(sys.argv[2]), atol=1e-4, rtol=1e-4)
model.quantize("int8")
torch.testing.assert_close(model.to("cpu")(ids), loaded(ids))
try:
    pyllm.save(model, sys.argv[1] + "-2")
except NotImplementedError as error:
    print(pyllm.ops.REFERENCE, "save without it" in str(error))
"""


@torch.no_grad()
def test_quantised_models_run_with_the_twins(tmp_path):
    torch.manual_seed(0)
    model = pyllm.Decoder(64, 32, 1, 2, context_length=32)
    model.quantize("int8")
    pyllm.save(model, tmp_path / "model")
    torch.save(model(torch.arange(9)[None]), tmp_path / "logits")
    done = subprocess.run([sys.executable, "-c", QUANTISED, tmp_path / "model", tmp_path / "logits"], text=True,
                          env=os.environ | {"PYLLM_REFERENCE": "1"}, capture_output=True, cwd=tmp_path)  # fmt: skip
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_a_traced_call_refuses_wrong_arguments(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(TypeError, match=r"\[linear\] takes x, weight, bias, but got 2 and sidewise"):
        ops.linear(randn(2, 8), randn(5, 8), sidewise=1)


def test_importing_and_generating_load_no_more_of_torch_than_torch_does(tmp_path):
    code = """
import sys, torch
had = {"torch._dynamo", "sympy"} & {*sys.modules}
import pyllm
from pyllm.engine import generate_ids
model = pyllm.LanguageModel(9, 8, 1)
for generating in (model, pyllm.Decoder(9, 8, 1, 2, position="learned"), pyllm.Decoder(9, 8, 1, 2, num_experts=2)):
    assert len(list(generate_ids(generating, [[1, 2]], max_tokens=4))) == 4
assert pyllm.Engine(model).generate([[1, 2]], max_tokens=4)[0].reason
print(sorted({"torch._dynamo", "sympy"} & {*sys.modules} - had))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path)
    assert done.stdout.split() == [b"[]"], done.stderr


def test_transforms_of_functions_are_refused():
    for call in (lambda x: ops.silu(x).sum(), lambda x: ops.layer_norm(x).sum()):
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.grad(call)(torch.randn(2, 3))
