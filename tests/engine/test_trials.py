"""A hundred of `trials.py`'s."""

import pytest
from engine.trials import KINDS, make, trial

TRIALS = 100


@pytest.mark.parametrize("kind", KINDS)
def test_a_needle_has_its_bits_among_any_neighbours(kind):
    model, first = make(kind), KINDS.index(kind)
    had = [trial(model, kind, seed, most=20) for seed in range(first, TRIALS, len(KINDS))]
    assert kind == "experts" or 0 < sum(h["recorded"] for h in had) < len(had)  # experts cannot be recorded
