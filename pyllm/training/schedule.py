from __future__ import annotations

import math
from collections.abc import Callable


def warmup_cosine(total: int, warmup: int | None = None, floor: float = 0.1) -> Callable[[int], float]:
    """The factor on the learning rate at a step: up to 1 in `warmup` steps (5 %), then a cosine down to `floor`."""
    warmup = max(1, total // 20) if warmup is None else warmup

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return factor
