import pytest
import torch
from twins import check_twin

from pyllm import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(x, positions, **options):
    check_twin(ops.rope, reference.rope, {"x": x, "positions": positions}, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "rotary_dim"),
    [((1, 1, 1, 2), None), ((2, 7, 3, 64), None), ((3, 5, 2, 22), None), ((2, 37, 1, 33), 14), ((1, 300, 2, 40), 40),
     ((0, 3, 2, 8), None), ((2, 0, 2, 8), None), ((2, 3, 2, 5), 0)],
)  # fmt: skip
def test_equals_its_twin(shape, rotary_dim, interleaved, dtype, isa):
    x = torch.randn(shape).to(dtype)
    for positions in (torch.randint(5000, shape[1:2]), torch.randint(5000, shape[:2], dtype=torch.int32)):
        check(x, positions, interleaved=interleaved, rotary_dim=rotary_dim)


def test_options(isa):
    x, positions = torch.randn(2, 5, 3, 32), torch.arange(5) + 100
    check(x, positions, theta=5e5, scale=1.3)
    check(x, positions, inv_freq=torch.rand(16), rotary_dim=32)
    check(x, positions, inv_freq=torch.rand(4).bfloat16(), rotary_dim=8, interleaved=True, scale=0.5)


def test_layouts(isa):
    positions = torch.arange(20).view(2, 10)
    base = torch.randn(2, 10, 3, 4, 24)
    for x in (base[:, :, 1], base[..., 3:19].flatten(2, 3), base[:, :, 0].transpose(1, 2)[:, :, :4], base[:, :, 0].mT):
        check(x, positions[:, : x.shape[1]])
        check(x, positions.T[: x.shape[1], 1])


def test_far_positions(isa):
    check(torch.randn(1, 6, 2, 64), torch.tensor([0, 131071, 1000003, 10**9, -5, -(10**6)]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_same_bits_alone_in_a_batch_and_for_any_threads(interleaved, dtype, isa, threads):
    x, positions = torch.randn(3, 200, 4, 44).to(dtype).requires_grad_(), torch.arange(200)
    results = []
    for n in (1, 2, 5):
        threads(n)
        y = ops.rope(x, positions, interleaved=interleaved)
        results.append((y, *torch.autograd.grad(y.sin().sum(), x)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    y = results[0][0]
    assert torch.equal(ops.rope(x[1:2, 150:], positions[150:], interleaved=interleaved), y[1:2, 150:])
    assert torch.equal(ops.rope(x, positions.expand(3, 200), interleaved=interleaved), y)
    for t in (0, 77):
        assert torch.equal(ops.rope(x[2:, t : t + 1], positions[t : t + 1], interleaved=interleaved), y[2:, t : t + 1])


def test_errors_name_the_argument():
    x, positions = torch.randn(2, 5, 3, 8), torch.arange(5)
    with pytest.raises(ValueError, match=r"\[rope\] positions must have shape \(5,\), but got \(4,\)"):
        ops.rope(x, positions[:4])
    with pytest.raises(ValueError, match=r"positions must have shape \(2, 5\), but got \(1, 5\)"):
        ops.rope(x, positions[None])
    with pytest.raises(TypeError, match="positions must be int64 or int32, but got float32"):
        ops.rope(x, positions.float())
    with pytest.raises(ValueError, match=r"x must have 4 dimension\(s\), but got shape \(5, 3, 8\)"):
        ops.rope(x[0], positions)
    for rotary_dim in (3, 10, -2):
        with pytest.raises(ValueError, match=rf"rotary_dim must be even and in \[0, 8\], but got {rotary_dim}"):
            ops.rope(x, positions, rotary_dim=rotary_dim)
    with pytest.raises(ValueError, match=r"inv_freq must have shape \(4,\), but got \(3,\)"):
        ops.rope(x, positions, inv_freq=torch.rand(3))
    with pytest.raises(ValueError, match="theta must be more than 0, but got -1"):
        ops.rope(x, positions, theta=-1.0)
    with pytest.raises(ValueError, match="inv_freq must not require a gradient"):
        ops.rope(x, positions, inv_freq=torch.rand(4, requires_grad=True))
