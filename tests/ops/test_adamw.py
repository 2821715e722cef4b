import pytest
import torch

from pyllm import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (3, 7), (0, 4), (), (1023,), (129, 131), (5, 1, 17)]


def state(dtype=torch.float32, moments=torch.float32, shapes=SHAPES):
    """parameters, gradients and both moments."""
    random = [torch.randn(s).to(dtype) for s in shapes], [torch.randn(s).mul(2).to(dtype) for s in shapes]
    return *random, [torch.randn(s).to(moments) for s in shapes], [torch.rand(s).to(moments) for s in shapes]


def cloned(lists):
    return [[t.clone() for t in some] for some in lists]


@pytest.mark.parametrize("options", [
    {"lr": 0.1}, {"lr": 0.01, "beta1": 0.0, "beta2": 0.5, "eps": 1e-3, "weight_decay": 0.5, "scale": 0.25},
    {"lr": 0.02, "beta1": 0.95, "scale": torch.tensor([0.5])}, {"lr": 0.0},
])  # fmt: skip
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_its_twin(dtype, wide, options, isa):
    made = state(dtype, torch.float32 if wide else dtype)
    ours, theirs, exact = cloned(made), cloned(made), [[t.double() for t in some] for some in made]
    for step in (1, 2, 1000):
        ops.adamw(*ours, step, **options)
        reference.adamw(*theirs, step, **options)
        reference.adamw(*exact, step, **options)
        for mine, twins, exacts in zip(ours, theirs, exact, strict=True):
            for a, b, e in zip(mine, twins, exacts, strict=True):
                if not a.numel():
                    continue
                error, bound = (a.double() - e).abs().max(), (b.double() - e).abs().max()
                assert error <= 2 * bound + 8 * torch.finfo(a.dtype).eps * e.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(ours[1], made[1], strict=True))


def test_is_the_optimiser_of_torch():
    made, leaves = state(shapes=[(40, 3), (77,)]), []
    for p, g in zip(*made[:2], strict=True):
        leaves.append(p.clone().requires_grad_())
        leaves[-1].grad = g.clone()
    options = {"lr": 0.03, "eps": 1e-6, "weight_decay": 0.2}
    theirs = torch.optim.AdamW(leaves, betas=(0.8, 0.95), **options)
    for moments in made[2:]:
        for m in moments:
            m.zero_()
    for step in range(1, 6):
        ops.adamw(*made, step, beta1=0.8, beta2=0.95, **options)
        theirs.step()
    for p, leaf in zip(made[0], leaves, strict=True):
        torch.testing.assert_close(p, leaf.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_threads_and_other_tensors(dtype, isa, threads):
    made = state(dtype, shapes=[*SHAPES, (40_000,), (3,)])
    threads(1)
    expected = cloned(made)
    ops.adamw(*expected, 3, lr=0.1, scale=0.3)
    threads(5)
    together, alone = cloned(made), cloned(made)
    ops.adamw(*together, 3, lr=0.1, scale=torch.tensor(0.3))
    for i in range(len(alone[0])):
        ops.adamw(*([some[i]] for some in alone), 3, lr=0.1, scale=0.3)
    for found in (together, alone):
        for a, b in zip(found, expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_what_is_not_finite_stays_where_it_is():
    made = state(shapes=[(50,)])
    clean = cloned(made)
    made[1][0][7], made[1][0][9] = torch.nan, torch.inf
    for lists in (made, clean):
        ops.adamw(*lists, 1, lr=0.1)
    others = [i for i in range(50) if i not in (7, 9)]
    assert made[0][0][[7, 9]].isnan().all() and torch.equal(made[0][0][others], clean[0][0][others])


def test_autograd_learns_of_the_change():
    made = state(shapes=[(3,)])
    p = made[0][0].requires_grad_()
    kept = (p * p).sum()
    version = p._version
    ops.adamw(*made, 1, lr=0.1)
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_nothing_to_do():
    ops.adamw([], [], [], [], 1, lr=0.1)


def test_errors_name_the_argument_and_change_nothing():
    made = state(shapes=[(3, 4), (5,)])
    before = cloned(made)

    def call(parameters=None, gradients=None, first=None, second=None, step=1, **options):
        given = [own if other is None else other
                 for own, other in zip(made, (parameters, gradients, first, second), strict=True)]  # fmt: skip
        ops.adamw(*given, step, **({"lr": 0.1} | options))

    spoilt = made[1][0], torch.ones(6)
    for message, kind, options in (
        (r"parameters, gradients and both moments must be as many, but got 2, 1, 2 and 2", ValueError,
         {"gradients": made[1][:1]}),
        (r"gradients\[1\] must have shape \(5,\), but got \(6,\)", ValueError, {"gradients": spoilt}),
        (r"gradients\[0\] must be float32, but got float16", TypeError, {"gradients": [t.half() for t in made[1]]}),
        (r"parameters\[1\] must be float32, but got bfloat16", TypeError,
         {"parameters": [made[0][0], made[0][1].bfloat16()]}),
        (r"first\[0\] must be float32, but got bfloat16", TypeError, {"first": [t.bfloat16() for t in made[2]]}),
        (r"second\[0\] must be float32, but got float16", TypeError, {"second": [t.half() for t in made[3]]}),
        (r"gradients\[0\] must be contiguous", ValueError, {"gradients": [torch.ones(4, 3).T, made[1][1]]}),
        (r"step must be 1 or more, but got 0", ValueError, {"step": 0}),
        (r"lr must be finite and 0 or more, but got nan", ValueError, {"lr": float("nan")}),
        (r"beta1 must be in \[0, 1\), but got 1", ValueError, {"beta1": 1.0}),
        (r"beta2 must be in \[0, 1\), but got -0.1", ValueError, {"beta2": -0.1}),
        (r"eps must be finite and 0 or more, but got -1", ValueError, {"eps": -1.0}),
        (r"weight_decay must be finite and 0 or more, but got -1", ValueError, {"weight_decay": -1.0}),
        (r"scale must have one element, but got shape \(2,\)", ValueError, {"scale": torch.ones(2)}),
        (r"scale must be float32, but got float64", TypeError, {"scale": torch.ones(()).double()}),
    ):  # fmt: skip
        with pytest.raises(kind, match=r"\[adamw\] " + message):
            call(**options)
    for a, b in zip(made, before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
