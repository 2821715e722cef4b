import pytest
import torch
from ops.test_adamw import DTYPES, SHAPES, cloned, state

from pyllm import _C, ops


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_the_cpu(dtype, wide, device, on_cpu):
    """More tensors than a launch takes, some longer than a block's piece, some that begin between packs of 16 bytes."""
    shapes = [*SHAPES, *[(n,) for n in range(90)], (4096,), (9001,)]
    made = state(dtype, torch.float32 if wide else dtype, shapes)
    ours = [[torch.cat((t.flatten()[:1], t.flatten())).to(device)[1:].view(t.shape) if i % 3 == 1 and t.numel()
             else t.clone().to(device) for i, t in enumerate(some)] for some in made]  # fmt: skip
    theirs = cloned(made)
    for step, scale in ((1, 1.0), (2, 0.25)):
        options = {"lr": 0.1, "weight_decay": 0.1}
        ops.adamw(*ours, step, **options, scale=torch.tensor(scale, device=device))
        on_cpu(lambda step=step, scale=scale, options=options: ops.adamw(*theirs, step, **options, scale=scale))
    close = 0 if _C.info()["isa"] != "baseline" else 4 * torch.finfo(dtype).eps  # whose sums round their products, too
    for mine, others in zip(ours, theirs, strict=True):
        for a, b in zip(mine, others, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=close, atol=8 * close)
