import pytest
import torch
from twins import check_twin

from pyllm import ops, reference
from pyllm.ops.route import through_experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("rows", "experts", "active"), [(7, 5, 2), (1, 1, 1), (3, 37, 37), (0, 4, 2), (130, 128, 8)])
def test_route_is_its_twin(rows, experts, active, normalised, dtype, isa):
    logits = torch.stack([torch.randperm(experts) / 7 for _ in range(rows)] or [torch.empty(experts)])[:rows]
    check_twin(ops.route, reference.route, {"logits": logits.to(dtype)}, active=active, normalised=normalised)
    wide = torch.zeros(rows, 2 * experts)
    wide[:, ::2] = logits
    for a, b in zip(ops.route(wide[:, ::2], active=active), ops.route(logits, active=active), strict=True):
        assert torch.equal(a, b)


def test_of_equals_the_first_are_taken(isa):
    found = ops.route(torch.tensor([[1.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]]), active=3)
    assert found.order.tolist() == [0, 1, 0, 1, 0, 1] and found.offsets.tolist() == [0, 2, 4, 6, 6]
    assert found.places.tolist() == [2, 4, 0, 1, 3, 5]


def test_rows_get_what_they_get_alone(isa, threads):
    logits = torch.randn(300, 40)
    found = ops.route(logits, active=6)
    experts = torch.searchsorted(found.offsets, found.places, right=True) - 1
    assert torch.equal(found.order[found.places], torch.arange(300).repeat_interleave(6))
    for row in (0, 7, 299):
        alone = ops.route(logits[row : row + 1], active=6)
        assert torch.equal(alone.weights[0], found.weights[row])
        its = torch.searchsorted(alone.offsets, alone.places, right=True) - 1
        assert torch.equal(its, experts.view(300, 6)[row])


def test_logits_that_are_not_finite_still_go_to_different_experts(isa):
    for bad in (float("nan"), float("inf"), -float("inf")):
        found = ops.route(torch.full((2, 9), bad), active=4)
        assert found.offsets[-1] == 8 and found.offsets.diff().max() == 2 and not found.weights.isfinite().any()


def test_wrong_numbers_of_experts_are_refused():
    for active in (0, -1, 5, 2**40):
        with pytest.raises(ValueError, match=r"\[route\] active must be from 1 to 4, the number of experts, but got"):
            ops.route(torch.randn(3, 4), active=active)


def test_rows_go_through_their_experts():
    x, offsets = torch.randn(6, 3), torch.tensor([0, 2, 2, 6])
    seen = []

    def expert(n):
        return lambda rows: seen.append(len(rows)) or rows * n

    y = through_experts([expert(n) for n in (1, 2, 3)], x, offsets)
    assert seen == [2, 4] and torch.equal(y, torch.cat((x[:2], x[2:] * 3)))
    assert through_experts([expert(1)], x[:0], torch.tensor([0, 0])).shape == (0, 3)


def test_probabilities_that_underflow_keep_their_order(isa):
    logits = torch.tensor([[0.0, -100.0, -90.0]])
    routes, exact = ops.route(logits, active=2), reference.route(logits, active=2)
    assert routes.offsets.tolist() == exact.offsets.tolist() == [0, 1, 1, 2] and routes.weights[0, 1] > 0
