from __future__ import annotations

import torch

from pyllm import _C, ops


def info() -> dict:
    """What runs here: version, instruction sets, threads, torch, CUDA, and the backends of each operation."""
    core = _C.info()
    backend = "reference" if ops.REFERENCE else "cpu"
    return {
        "version": core["version"],
        "instruction_sets": core["isas"],
        "chosen": core["isa"],
        "threads": core["threads"],
        "thread_backend": core["thread_backend"],
        "torch": torch.__version__,
        "cuda_built": core["cuda_built"],
        "cuda_devices": core["cuda_devices"],
        "ops": {name: [backend] for name in ops.__all__ if name[0].islower()},
    }


def num_threads() -> int:
    """How many threads the compiled operations use."""
    return _C.num_threads()


def set_num_threads(n: int) -> None:
    """Sets how many threads the compiled operations use, 1 to 4096; torch.set_num_threads sets torch's own."""
    _C.set_num_threads(n)
