import math

import pytest
import torch

from pyllm import ops, reference
from pyllm.reference.sample import distribution, philox, uniform

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SETTINGS = {
    "plain": {},
    "greedy": {"temperature": 0},
    "hot": {"temperature": 1.7},
    "cold": {"temperature": 0.3},
    "top_k": {"top_k": 5},
    "large top_k": {"top_k": 700, "temperature": 0.9},
    "top_k beyond the vocabulary": {"top_k": 10**6},
    "top_p": {"top_p": 0.9},
    "top_p where most weights underflow": {"top_p": 0.9, "temperature": 0.02},
    "typical_p where most weights underflow": {"typical_p": 0.6, "temperature": 0.02},
    "small top_p": {"top_p": 0.05, "temperature": 2.0},
    "top_p near 1": {"top_p": 0.9995},
    "top_k and top_p": {"top_k": 50, "top_p": 0.9, "temperature": 0.8},
    "min_p": {"min_p": 0.05},
    "top_p and min_p": {"top_p": 0.95, "min_p": 0.02},
    "min_p 1": {"min_p": 1.0},
    "typical_p": {"typical_p": 0.6},
    "everything": {"temperature": 1.3, "top_k": 400, "top_p": 0.97, "min_p": 0.001, "typical_p": 0.9},
}  # fmt: skip


def check(logits, **options):
    """Equality with the twin in float64; another id only where the uniform number is within rounding of its border."""
    options = {"seeds": 7, "positions": torch.arange(len(logits))} | options
    ours = ops.sample(logits, **options)
    exact = reference.sample(logits.double(), **options)
    filters = {k: v for k, v in options.items() if k not in ("seeds", "positions")}
    compare(ours, exact.ids, logits, distribution(logits.double(), **filters), options["seeds"], options["positions"])
    return ours


def compare(ours, ids, logits, processed, seeds, positions):
    assert ours.ids.dtype == torch.int64 and ours.logprobs.dtype == ours.processed_logprobs.dtype == torch.float32
    assert ((ours.ids >= 0) & (ours.ids < logits.shape[1])).all()
    pick, p = ours.ids[:, None], processed.exp()
    upper = p.cumsum(-1).expand(logits.shape).gather(1, pick)[:, 0]
    u = uniform(seeds, positions, len(logits))
    near = (u >= upper - p.expand(logits.shape).gather(1, pick)[:, 0] - 2e-6) & (u <= upper + 2e-6)
    assert ((ours.ids == ids) | near).all(), (ours.ids, ids)
    raw = logits[: len(p)].double().log_softmax(-1)
    for got, log_p in ((ours.logprobs, raw), (ours.processed_logprobs, processed)):
        expected = log_p.expand(logits.shape).gather(1, pick)[:, 0]
        torch.testing.assert_close(got.double(), expected, atol=5e-5, rtol=2e-6)


def logits_of(rows, vocab, dtype=torch.float32, spread=2.0):
    return torch.randn(rows, vocab).mul(spread).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_equals_its_twin(settings, dtype, isa):
    for rows, vocab, spread in (
        (1, 1, 1),
        (2, 2, 1),
        (5, 21, 4),
        (3, 1023, 2),
        (2, 2500, 1),
        (3, 20011, 1),
        (2, 20011, 6),
    ):
        check(logits_of(rows, vocab, dtype, spread), **settings)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_large_vocabulary_peaked_and_flat(settings, threads):
    threads(2)
    flat = logits_of(1, 151_936, spread=0.5)
    peaked = flat * 8
    for logits in (flat, peaked, peaked.sort(-1).values, peaked.bfloat16(), torch.zeros_like(flat)):
        check(logits, **settings)


def test_many_draws_of_one_row(isa):
    positions = torch.arange(1000)
    for vocab in (300, 3000):
        row = logits_of(1, vocab)
        for settings in SETTINGS.values():
            drawn = ops.sample(row.expand(1000, -1), seeds=7, positions=positions, **settings)
            processed = distribution(row.double(), **settings)
            cdf = processed[0].exp().cumsum(0)
            expected = torch.searchsorted(cdf, uniform(7, positions, 1000) * cdf[-1], right=True)
            compare(drawn, expected, row.expand(1000, -1), processed, 7, positions)
            assert (drawn.ids == expected).sum() > 990


def test_every_setting_has_a_value_for_each_row(isa):
    for vocab in (50, 5000):
        logits = logits_of(6, vocab)
        options = {
            "seeds": torch.tensor([1, -1, 2**62, 3, 3, 0]),
            "positions": torch.tensor([0, 5, 2**40, -9, 8, 8]),
            "temperature": torch.tensor([1.0, 0.0, 0.7, 1.5, 1.0, 2.0]),
            "top_k": torch.tensor([0, 3, 5, 0, 0, 30]),
            "top_p": torch.tensor([1.0, 0.5, 0.8, 0.9, 1.0, 0.99]),
            "min_p": torch.tensor([0.0, 0.1, 0.0, 0.05, 0.3, 0.0]),
            "typical_p": torch.tensor([1.0, 1.0, 0.9, 1.0, 0.5, 0.8]),
            "repetition_penalty": torch.tensor([1.0, 1.3, 1.0, 0.8, 1.0, 2.0]),
            "frequency_penalty": torch.tensor([0.0, 0.2, 0.0, -0.4, 0.5, 0.0]),
            "presence_penalty": torch.tensor([0.0, 0.0, 0.7, 0.1, 0.0, 0.0]),
            "history": torch.randint(-1, 20, (6, 40)),
            "logit_bias": torch.randn(6, vocab),
        }
        together = check(logits, **options)
        for i in range(6):
            alone = {k: (v[i : i + 1] if k in ("history", "logit_bias") else v[i].item()) for k, v in options.items()}
            one = ops.sample(logits[i : i + 1], **alone)
            assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, one, strict=True))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_ids_that_are_given_are_scored_as_if_drawn(settings, isa):
    for vocab in (21, 5000):
        logits, given = logits_of(40, vocab), torch.randint(vocab, (40,))
        given[::3] = logits.topk(8).indices[::3, 0]
        options = {"seeds": 5, "positions": torch.arange(40), **settings}
        drawn = ops.sample(logits, **options)
        again = ops.sample(logits, **options, given=drawn.ids)
        assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
        found = ops.sample(logits, **options, given=given)
        expected = reference.sample(logits.double(), **options, given=given)
        assert torch.equal(found.ids, given)
        torch.testing.assert_close(found.logprobs.double(), expected.logprobs, atol=5e-5, rtol=2e-6)
        torch.testing.assert_close(found.processed_logprobs.double(), expected.processed_logprobs, atol=5e-5, rtol=2e-6)
        some = ops.sample(logits, **options, given=torch.where(torch.arange(40) % 2 == 0, given, -1))
        assert torch.equal(some.ids[::2], given[::2]) and torch.equal(some.ids[1::2], drawn.ids[1::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_penalties_and_bias(dtype, isa):
    for vocab in (40, 4001):
        logits = logits_of(16, vocab, dtype)
        history = torch.randint(-1, 30, (16, 25))
        bias = torch.randn(vocab)
        bias[::3] = -torch.inf
        for settings in (
            {"repetition_penalty": 1.5},
            {"frequency_penalty": 0.7},
            {"presence_penalty": 2.0, "top_p": 0.8},
        ):
            check(logits, history=history, **settings)
            check(logits, history=history.T.contiguous().T, logit_bias=bias, top_k=20, **settings)
        drawn = check(logits, logit_bias=bias, temperature=3.0)
        assert (drawn.ids % 3 != 0).all()
        check(logits, logit_bias=torch.randn(vocab, 16).T, temperature=0)
        check(logits, history=torch.full((16, 3), -1), repetition_penalty=9.0)
        check(logits, history=torch.empty(16, 0, dtype=torch.int64), repetition_penalty=9.0)


def test_masked_ids_are_never_drawn(isa):
    for vocab in (33, 3000):
        logits = torch.full((500, vocab), -torch.inf)
        logits[:, 7], logits[:, vocab - 2] = 0.5, -3.0
        for settings in SETTINGS.values():
            drawn = ops.sample(logits, seeds=1, positions=torch.arange(500), **settings)
            assert torch.isin(drawn.ids, torch.tensor([7, vocab - 2])).all()
            assert torch.isfinite(drawn.processed_logprobs).all()


def test_ties_at_the_border_stay():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]]).expand(400, 6)
    for settings in ({"top_k": 2}, {"top_p": 0.55}):
        ids = check(logits, **settings).ids
        assert ids.unique().tolist() == [1, 2, 3, 4]


def test_greedy_is_argmax_and_the_lowest_id_wins(isa):
    for dtype in DTYPES:
        for vocab in (5, 1024, 30_000):
            logits = torch.randint(-9, 9, (7, vocab)).to(dtype)
            drawn = ops.sample(logits, seeds=0, positions=0, temperature=0.0, top_k=3, typical_p=0.1)
            assert torch.equal(drawn.ids, torch.tensor([row.index(max(row)) for row in logits.tolist()]))
            assert (drawn.processed_logprobs == 0).all()


def test_extreme_logits(isa):
    big = torch.tensor([[3e38, -3e38, 2.9e38], [-3e38, -3e38, -3.4e38], [1e-40, 0.0, -1e-40]])
    for temperature in (0.0, 1e-38, 0.5, 1e30):
        drawn = ops.sample(big, seeds=0, positions=torch.arange(3), temperature=temperature)
        assert torch.isfinite(drawn.processed_logprobs).all()


def test_layouts(isa):
    base = logits_of(8, 3 * 700)
    for logits in (base[:, 100:833], base[:, ::3], base.T[:64].contiguous().T, base[1::2], base[:1].expand(5, -1)):
        check(logits, top_p=0.9)
        same = ops.sample(logits.contiguous(), seeds=3, positions=1, top_p=0.9)
        assert all(
            torch.equal(a, b) for a, b in zip(ops.sample(logits, seeds=3, positions=1, top_p=0.9), same, strict=True)
        )
    for logits in (torch.empty(0, 9), base[:0]):
        assert all(t.shape == (0,) for t in ops.sample(logits, seeds=3, positions=1))


@pytest.mark.parametrize("vocab", [700, 20_001])
def test_same_bits_alone_in_a_batch_and_for_any_threads(vocab, threads):
    logits, history = logits_of(7, vocab), torch.randint(0, vocab, (7, 50))
    for settings in SETTINGS.values():
        for more in ({}, {"history": history, "repetition_penalty": 1.2, "logit_bias": torch.randn(vocab)}):
            options = {"seeds": 5, **settings, **more}
            results = []
            for n in (1, 2, 5):
                threads(n)
                results.append(ops.sample(logits, positions=torch.arange(7), **options))
                if "history" in options:
                    padded = torch.cat([torch.full((7, 9), -1), history], 1)
                    results.append(ops.sample(logits, positions=torch.arange(7), **options | {"history": padded}))
                alone = [ops.sample(logits[i : i + 1], positions=i, **{k: v[i : i + 1] if k == "history" else v
                                                                      for k, v in options.items()})
                         for i in range(7)]  # fmt: skip
                results.append([torch.cat(parts) for parts in zip(*alone, strict=True)])
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


HISTORY = torch.tensor([[0, 3, 3, 3, 7, -1, 12, 12]])
LOOKING_BACK = {
    "repetition": {"repetition_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.4},
    "presence": {"presence_penalty": -0.7},
    "all penalties, cold": {"repetition_penalty": 0.8, "frequency_penalty": 0.3, "presence_penalty": 0.2, "top_p": 0.9},
}
BIASED = {"bias": {}, "bias, top_k": {"top_k": 9, "temperature": 1.4}}


@pytest.mark.parametrize("counter", ["positions", "seeds"])
@pytest.mark.parametrize("name", [*SETTINGS, *LOOKING_BACK, *BIASED])
def test_draws_follow_the_distribution(name, counter):
    """Chi-square of 100,000 draws against the exact distribution."""
    logits, n = logits_of(1, 40), 100_000
    settings = dict((SETTINGS | LOOKING_BACK | BIASED)[name])
    if name in LOOKING_BACK:
        settings["history"] = HISTORY
    if name in BIASED:
        settings["logit_bias"] = torch.linspace(-2, 2, 40).masked_fill(torch.arange(40) % 7 == 3, -math.inf)
    p = distribution(logits.double(), **settings).exp()[0]
    if name in LOOKING_BACK:
        settings["history"] = HISTORY.expand(n, -1)
    numbers = {"positions": 5, "seeds": 11} | {counter: torch.arange(n)}
    ids = ops.sample(logits.expand(n, -1), **numbers, **settings).ids
    seen = ids.bincount(minlength=40).double()
    assert (seen[p == 0] == 0).all()
    often = n * p > 5
    statistic = ((seen - n * p)[often] ** 2 / (n * p)[often]).sum().item()
    freedom = int(often.sum()) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 4


def test_philox_against_its_authors_vectors():
    # Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, output.
    for line in (
        "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
        "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
    ):
        words = [torch.tensor(int(w, 16)) for w in line.split()]
        assert philox(words[:4], words[4:6]) == words[6:]


def test_uniform_numbers_are_the_twin_s(isa):
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345678901234])
    positions = torch.tensor([0, 2**32, 7, -1, 2**63 - 1, 2**31])
    expected = (uniform(seeds, positions, 6) * 4096).long()
    assert torch.equal(ops.sample(torch.zeros(6, 4096), seeds=seeds, positions=positions).ids, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("vocab", [9, 5000])
def test_rows_that_are_not_finite(bad, vocab, isa):
    for dtype in DTYPES:
        for column in (0, vocab - 1):
            logits = logits_of(4, vocab, dtype)
            logits[2, column] = bad
            for settings in SETTINGS.values():
                with pytest.raises(
                    ValueError, match="logits must be finite or -infinity, but row 2 has NaN or infinity"
                ):
                    ops.sample(logits, seeds=0, positions=0, **settings)
    bias = torch.zeros(4, vocab)
    bias[3, vocab // 2] = bad
    with pytest.raises(ValueError, match="with penalties and logit_bias must be finite or -infinity, but row 3"):
        ops.sample(logits_of(4, vocab), seeds=0, positions=0, logit_bias=bias)


@pytest.mark.parametrize("shape", [(), (8,), (1, 2, 8)])
def test_logits_that_are_no_rows(shape):
    with pytest.raises(ValueError, match=r"\[sample\] logits must have 2 dimension"):
        ops.sample(torch.zeros(shape), seeds=0, positions=0)


def test_rows_with_nothing_left():
    logits = torch.zeros(3, 8)
    logits[1] = -torch.inf
    with pytest.raises(ValueError, match="row 1 is all -infinity"):
        ops.sample(logits, seeds=0, positions=0)
    with pytest.raises(ValueError, match="leave a finite logit in each row, but row 0 is all -infinity"):
        ops.sample(logits[:1], seeds=0, positions=0, logit_bias=torch.full((8,), -torch.inf))
    history = torch.tensor([[-1], [2], [0]])
    with pytest.raises(ValueError, match="must be finite or -infinity, but row 2"):
        ops.sample(torch.full((3, 8), 1e30), seeds=0, positions=0, history=history[[0, 0, 2]], repetition_penalty=1e-30)


BAD_SETTINGS = {
    "temperature": (-0.5, math.nan, math.inf),
    "top_k": (-1,),
    "top_p": (0.0, 1.5, math.nan),
    "min_p": (-0.1, 1.1, math.nan),
    "typical_p": (0.0, 2.0),
    "repetition_penalty": (0.0, -1.0, math.inf),
    "frequency_penalty": (math.nan, math.inf),
    "presence_penalty": (math.nan, -math.inf),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_out_of_range(name):
    logits, good = torch.zeros(3, 8), 1 if name == "top_k" else 0.5
    options = {"seeds": 0, "positions": 0, "history": torch.tensor([[1]] * 3)}
    ops.sample(logits, **options, **{name: good})
    for bad in BAD_SETTINGS[name]:
        with pytest.raises(ValueError, match=rf"\[sample\] {name} must be .*, but got {bad:g}"):
            ops.sample(logits, **options, **{name: bad})
        with pytest.raises(ValueError, match=rf"\[sample\] {name} must be .*, but row 1 has {bad:g}"):
            ops.sample(logits, **options, **{name: torch.tensor([good, bad, good])})
    with pytest.raises(ValueError, match=rf"{name} must have shape \(3,\), but got \(2,\)"):
        ops.sample(logits, **options, **{name: torch.tensor([good, good])})
    with pytest.raises(TypeError, match=f"{name} must be"):
        ops.sample(logits, **options, **{name: torch.tensor([1, 1, 1], dtype=torch.int32)})
    for bad in (2**64, -(2**64)):
        with pytest.raises(ValueError, match=rf"\[sample\] {name} must "):
            ops.sample(logits, **options, **{name: bad})


def test_errors_name_the_argument():
    logits = torch.zeros(2, 8)
    options = {"seeds": 0, "positions": 0}
    for bad in (8, -2):
        with pytest.raises(IndexError, match=f"history must hold ids from 0 to 7, or -1 for none, but row 1 has {bad}"):
            ops.sample(logits, **options, history=torch.tensor([[3, 7], [-1, bad]]))
        with pytest.raises(IndexError, match=f"given must hold ids from 0 to 7, or -1 for a draw, but row 1 has {bad}"):
            ops.sample(logits, **options, given=torch.tensor([-1, bad]))
    with pytest.raises(TypeError, match="given must be int64, but got int32"):
        ops.sample(logits, **options, given=torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"given must have shape \(2,\), but got \(1,\)"):
        ops.sample(logits, **options, given=torch.zeros(1, dtype=torch.int64))
    with pytest.raises(TypeError, match="history must be int64, but got int32"):
        ops.sample(logits, **options, history=torch.zeros(2, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"history must have shape \(2, 3\), but got \(1, 3\)"):
        ops.sample(logits, **options, history=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="need a history, but got None"):
        ops.sample(logits, **options, repetition_penalty=1.1)
    with pytest.raises(ValueError, match=r"logit_bias must have shape \(8,\), but got \(7,\)"):
        ops.sample(logits, **options, logit_bias=torch.zeros(7))
    with pytest.raises(ValueError, match=r"logit_bias must have shape \(2, 8\), but got \(3, 8\)"):
        ops.sample(logits, **options, logit_bias=torch.zeros(3, 8))
    with pytest.raises(TypeError, match="logit_bias must be float32, but got bfloat16"):
        ops.sample(logits, **options, logit_bias=torch.zeros(8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"logits must have 2 dimension\(s\), but got shape \(8,\)"):
        ops.sample(logits[0], **options)
    with pytest.raises(ValueError, match=r"logits must have 1 to .* columns"):
        ops.sample(logits[:, :0], **options)
    with pytest.raises(TypeError, match="logits must be float32, bfloat16 or float16, but got int64"):
        ops.sample(logits.long(), **options)
    for name in ("seeds", "positions"):
        with pytest.raises(TypeError, match=f"{name} must be an int or an int64 tensor, but got 0.5"):
            ops.sample(logits, **options | {name: 0.5})
        with pytest.raises(ValueError, match=f"{name} must fit in 64 bits"):
            ops.sample(logits, **options | {name: 2**63})
        with pytest.raises(TypeError, match=f"{name} must be int64, but got float32"):
            ops.sample(logits, **options | {name: torch.zeros(2)})
