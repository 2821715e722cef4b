"""Every operation, on good arguments of which one is spoilt: a typed error that names the operation in brackets."""

import inspect
import re

import pytest
import torch

from pyllm import ops


def parameters(gates, hidden, inputs=5):
    return [torch.randn(gates * hidden, n) for n in (inputs, hidden)] + [torch.randn(gates * hidden) for _ in range(2)]


ids = torch.tensor([[1, 0, 3], [2, 2, 4]])
rows = torch.randn(2, 3, 8)
heads = torch.randn(2, 3, 2, 8)

values, scales = torch.randint(0, 256, (5, 32), dtype=torch.uint8), torch.ones(5, 1)
quantized = ops.pack_quantized(ops.QuantizedWeight(values, scales, None, 8, (5, 8)))

GOOD = {
    "adamw": {k: [torch.rand(2, 3), torch.rand(4)] for k in ("parameters", "gradients", "first", "second")}
    | {"step": 1, "lr": 0.1},
    "attention": {
        "q": heads,
        "k": heads,
        "v": heads,
        "bias": torch.randn(2, 3, 3),
        "key_lengths": torch.tensor([2, 3]),
    },
    "cross_entropy": {"logits": torch.randn(2, 3, 5), "targets": ids},
    "elementwise": {"kind": "add", "a": rows, "b": rows},
    "embedding": {"ids": ids, "weight": torch.randn(5, 4)},
    "geglu": {"gate": rows, "up": rows},
    "gelu": {"x": rows},
    "gru": {"x": torch.randn(2, 3, 5), "params": parameters(3, 4), "h0": torch.randn(1, 2, 4)},
    "gru_cell": {"x": torch.randn(2, 5), "h": torch.randn(2, 4)}
    | dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), parameters(3, 4), strict=True)),
    "layer_norm": {"x": rows, "weight": torch.randn(8), "bias": torch.randn(8), "residual": rows},
    "linear": {"x": rows, "weight": torch.randn(5, 8), "bias": torch.randn(5)},
    "linear_cross_entropy": {"x": rows, "weight": torch.randn(5, 8), "targets": ids, "bias": torch.randn(5)},
    "lstm": {"x": torch.randn(2, 3, 5), "params": parameters(4, 4), "lengths": torch.tensor([3, 1])},
    "lstm_cell": {"x": torch.randn(2, 5), "state": (torch.randn(2, 4), torch.randn(2, 4))}
    | dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), parameters(4, 4), strict=True)),
    "next_positions": {"lengths": torch.tensor([1, 3]), "count": 2, "capacity": 9},
    "quantized_embedding": {"ids": ids, "weight": quantized},
    "quantized_linear": {"x": rows, "weight": quantized, "bias": torch.randn(5)},
    "relu_squared": {"x": rows},
    "rms_norm": {"x": rows, "weight": torch.randn(8), "residual": rows},
    "rnn": {"x": torch.randn(2, 3, 5), "params": parameters(1, 4), "h0": torch.randn(1, 2, 4)},
    "rnn_cell": {"x": torch.randn(2, 5), "h": torch.randn(2, 4)}
    | dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), parameters(1, 4), strict=True)),
    "rope": {"x": heads, "positions": torch.arange(3)},
    "route": {"logits": torch.randn(5, 4), "active": 2},
    "sample": {"logits": torch.randn(3, 50), "seeds": 1, "positions": torch.arange(3)},
    "sigmoid": {"x": rows},
    "silu": {"x": rows},
    "swiglu": {"gate": rows, "up": rows},
    "tanh": {"x": rows},
    "wkv": dict.fromkeys("rwkvab", heads) | {"state": torch.randn(2, 2, 8, 8), "lengths": torch.tensor([3, 1])},
    "write_pages": {
        "pages": torch.randn(4, 64, 2, 8),
        "rows": heads,
        "page_table": torch.tensor([[0, 1], [3, 2]], dtype=torch.int32),
        "positions": ids,
    },
}
OUT_OF_RANGE = {
    "cross_entropy": "targets",
    "embedding": "ids",
    "linear_cross_entropy": "targets",
    "quantized_embedding": "ids",
}
FINE = {  # what is not a mistake after all
    ("attention", "v", "size"),
    ("cross_entropy", "logits", "size"),
    ("elementwise", "a", "rank"),
    ("elementwise", "b", "rank"),
    ("embedding", "ids", "rank"),
    ("embedding", "ids", "size"),
    ("embedding", "weight", "size"),
    ("gelu", "x", "rank"),
    ("gelu", "x", "size"),
    ("linear", "x", "rank"),
    ("next_positions", "lengths", "size"),
    ("quantized_embedding", "ids", "rank"),
    ("quantized_embedding", "ids", "size"),
    ("quantized_linear", "x", "rank"),
    ("route", "logits", "size"),
    ("sample", "logits", "size"),
    ("write_pages", "page_table", "size"),
    *((name, "x", spoil) for name in ("relu_squared", "sigmoid", "silu", "tanh") for spoil in ("rank", "size")),
}
OPS = sorted(
    {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))} - {"pack_linear", "pack_quantized"}
)

SPOIL = {
    "dtype": lambda t: t.to(torch.complex64) if t.is_floating_point() else t.to(torch.float64),
    "rank": lambda t: t[(None,) * 5],
    "size": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1] + 1] if t.dim() else t[None].expand(7),
    "device": lambda t: t.to("meta"),
    "list": lambda t: t.tolist(),
    "string": lambda t: "tensor",
}


def cases():
    for name in OPS:
        for argument, value in GOOD[name].items():
            parts = range(len(value)) if isinstance(value, (list, tuple)) else [None]
            for part in parts:
                if isinstance(value, int | float | str | ops.PackedQuantizedWeight):
                    continue
                for spoil in SPOIL:
                    if (name, argument, spoil) not in FINE:
                        yield pytest.param(name, argument, part, spoil, id=f"{name}-{argument}-{part}-{spoil}")


def test_every_op_has_good_arguments():
    assert set(OPS) <= GOOD.keys()
    for name in OPS:
        getattr(ops, name)(**GOOD[name])


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("name", "argument", "part", "spoil"), list(cases()))
def test_a_spoilt_argument_is_a_typed_error(name, argument, part, spoil, gradients):
    arguments = {
        k: v.clone().requires_grad_(gradients and v.is_floating_point()) if isinstance(v, torch.Tensor) else v
        for k, v in GOOD[name].items()
    }
    if part is None:
        arguments[argument] = SPOIL[spoil](GOOD[name][argument])
    else:
        parts = list(arguments[argument])
        parts[part] = SPOIL[spoil](parts[part])
        arguments[argument] = type(GOOD[name][argument])(parts)
    with pytest.raises((ValueError, TypeError, IndexError, NotImplementedError)) as error:
        getattr(ops, name)(**arguments)
    assert re.match(r"\[\w+\] ", str(error.value)), error.value


@pytest.mark.parametrize("name", [name for name in OPS if name in OUT_OF_RANGE])
@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**63)])
def test_an_id_out_of_range_is_an_index_error(name, bad):
    arguments = dict(GOOD[name])
    arguments[OUT_OF_RANGE[name]] = ids.masked_fill(ids == 3, bad)
    with pytest.raises(IndexError, match=rf"\[{name}\].*{bad}"):
        getattr(ops, name)(**arguments)
