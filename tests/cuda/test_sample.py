import pytest
import torch
from ops.test_sample import SETTINGS, compare, distribution

import pyllm
from pyllm import _C, ops, reference
from pyllm.ops import Sample

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(logits, device, **options):
    """As the twin in float64 draws, but where the uniform number is within rounding of a border."""
    options = {"seeds": 7, "positions": torch.arange(len(logits))} | options
    on_device = {k: options[k].to(device) for k in ("history", "logit_bias") if k in options}
    ours = Sample(*(t.cpu() for t in ops.sample(logits.to(device), **(options | on_device))))
    pyllm.synchronize()
    exact = reference.sample(logits.double(), **options)
    filters = {k: v for k, v in options.items() if k not in ("seeds", "positions")}
    compare(ours, exact.ids, logits, distribution(logits.double(), **filters), options["seeds"], options["positions"])
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_equals_its_twin(settings, dtype, device):
    for rows, vocab, spread in ((1, 1, 1), (2, 2, 1), (3, 1023, 2), (1, 2500, 4)):
        check(torch.randn(rows, vocab).mul(spread).to(dtype), device, **settings)


def test_ties_and_masked_logits(device):
    row = torch.full((1, 1100), -1.0)
    row[0, [3, 500, 1090]] = 2.0
    assert check(row, device, temperature=0).ids.item() == 3
    for settings in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.01}, {"min_p": 1.0}):
        drawn = check(row.expand(6, -1), device, **settings)
        assert set(drawn.ids.tolist()) <= {3, 500, 1090}
        assert drawn.processed_logprobs.exp().sub(1 / 3).abs().max() < 1e-6
    row[0, 1:] = -torch.inf
    assert check(row, device).ids.item() == 0


def test_borders_between_any_two_numbers(device):
    values = [-1e30, -5.0, -1.0, -1.0 + 2**-24, -1e-20, -1e-44, 0.0, 1e-44, 1e-20, 2.0, 2.0 + 2**-22, 3.0]
    n = len(values)
    rows, given = torch.tensor(values)[torch.randperm(n)].expand(n, n), torch.arange(n, device=device)
    for k in range(1, n + 1):
        left = ops.sample(rows.to(device), seeds=1, positions=0, top_k=k, given=given).processed_logprobs.cpu()
        assert set(rows[0][left > -torch.inf].tolist()) == set(rows[0].topk(k).values.tolist())


def test_penalties_bias_and_a_value_for_each_row(device):
    options = {
        "seeds": torch.tensor([1, -1, 2**62, 3]), "positions": torch.tensor([0, 5, 2**40, -9]),
        "temperature": torch.tensor([1.0, 0.0, 0.7, 1.5]), "top_k": torch.tensor([0, 3, 5, 0]),
        "top_p": torch.tensor([1.0, 0.5, 0.8, 0.9]), "typical_p": torch.tensor([1.0, 1.0, 0.9, 0.5]),
        "repetition_penalty": torch.tensor([1.0, 1.3, 1.0, 0.8]),
        "frequency_penalty": torch.tensor([0.0, 0.2, 0.0, -0.4]),
        "presence_penalty": torch.tensor([0.0, 0.0, 0.7, 0.1]), "history": torch.randint(-1, 20, (4, 40)),
    }  # fmt: skip
    for bias in (torch.randn(1500), torch.randn(4, 1500)):
        check(torch.randn(4, 1500) * 2, device, logit_bias=bias, **options)


def test_the_ids_of_the_cpu(device):
    logits = torch.randn(24, 700).mul(2)
    on_device = ops.sample(logits.to(device), seeds=3, positions=torch.arange(24), top_p=0.9).ids.cpu()
    given = torch.randint(-1, 700, (24,))
    options = {"seeds": 3, "positions": torch.arange(24), "top_p": 0.9}
    scored = ops.sample(logits.to(device), given=given.to(device), **options)
    if _C.info()["cuda_emulated"]:
        _C._emulate_cuda(False)
    for ours, theirs in zip(scored, ops.sample(logits, given=given, **options), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(on_device, ops.sample(logits, seeds=3, positions=torch.arange(24), top_p=0.9).ids)


def test_wrong_rows_and_histories(device):
    plain = {"seeds": 1, "positions": 0}
    for spoilt, message in (
        (torch.nan, "finite or -infinity, but NaN or infinity is in row 1"),
        (torch.inf, "finite or -infinity, but NaN or infinity is in row 1"),
        (-torch.inf, "a finite element in each row, but all are -infinity in row 1"),
    ):
        logits = torch.randn(3, 40, device=device)
        logits[1] = spoilt
        drawn = ops.sample(logits, **plain)
        with pytest.raises(ValueError, match=r"\[sample\] logits must (have|be) " + message):
            pyllm.synchronize()
        assert drawn.logprobs.isnan().tolist() == [False, True, False]
    logits, bias = torch.randn(2, 40, device=device), torch.zeros(40, device=device)
    for value, message in (
        (torch.nan, "with penalties and logit_bias must be finite"),
        (-torch.inf, "must leave a finite"),
    ):
        ops.sample(logits, logit_bias=bias + value, **plain)
        with pytest.raises(ValueError, match=message):
            pyllm.synchronize()
    ops.sample(logits, history=torch.tensor([[1, 40], [0, 0]], device=device), presence_penalty=1.0, **plain)
    with pytest.raises(IndexError, match=r"\[sample\] history must be -1 or in \[0, 40\), but got 40 at element 1"):
        pyllm.synchronize()
    ops.sample(logits, given=torch.tensor([-1, 40], device=device), **plain)
    with pytest.raises(IndexError, match=r"\[sample\] given must be -1 or in \[0, 40\), but got 40 at element 1"):
        pyllm.synchronize()
    with pytest.raises(ValueError, match="temperature must be finite and 0 or more"):
        ops.sample(logits, temperature=-1.0, **plain)
