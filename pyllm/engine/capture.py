"""A model's step on a CUDA device as a CUDA graph: torch's products and our kernels, all launched at once.

What changes from step to step lies in the device's memory, as for a recording (`pyllm.engine.recording`), which takes
the place of this on the CPU. Capturing computes nothing, either: a capture that fails has changed nothing, and the
model runs as it is. A step must have run once before, so that kernels are loaded and libraries have their memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyllm import ops
from pyllm.engine.recording import NotRecordable


class Captured:
    """What `step` launches on a CUDA device, to be launched again by `run`. Graphs with the same `memory` share it:
    only one of them runs at a time, and its results are read before another does.

    Other threads may use the device meanwhile. Afterwards the current device and stream are those of before, also
    where a capture fails, after which torch leaves its own stream the current one.

    Raises:
        NotRecordable: a step that waits for the device, or that does something else which no graph can hold.
    """

    def __init__(self, step: Callable[[], Tensor], memory: list[Any], device: torch.device):
        if torch.is_grad_enabled() or ops.REFERENCE:
            raise NotRecordable("steps are captured of compiled operations alone, and without gradients")
        if not memory:  # what shares a pool shares a stream
            memory += torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        pool, stream = memory
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                torch.cuda.current_blas_handle()  # this thread's first would be made within the capture
                with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    self.out = step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise NotRecordable(f"a step that waits for the device cannot be a CUDA graph: {error}") from error

    def run(self) -> None:
        self.graph.replay()
