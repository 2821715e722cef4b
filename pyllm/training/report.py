from __future__ import annotations

import os
from pathlib import Path

from pyllm.training.metrics import History


def plot_losses(histories: dict[str, History], path: str | os.PathLike) -> None:
    """Draws each training's loss (smoothed) and validation loss over its tokens, as a PNG. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("drawing needs matplotlib: pip install 'pyllm[plot]'") from e
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (name, history) in enumerate(histories.items()):
        steps = len(history.losses)
        per_step = history.tokens / max(1, steps) / 1e6
        average, smoothed, weight = 0.0, [], 0.0
        for loss in history.losses:
            average, weight = 0.98 * average + 0.02 * loss, 0.98 * weight + 0.02
            smoothed.append(average / weight)
        axes.plot([per_step * (s + 1) for s in range(steps)], smoothed, color=f"C{i}", label=f"{name}, training")
        axes.plot([per_step * s for s, _ in history.validation], [m.loss for _, m in history.validation],
                  "o--", color=f"C{i}", label=f"{name}, validation")  # fmt: skip
    axes.set_xlabel("tokens seen, millions")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=130)
    partial.replace(path)
