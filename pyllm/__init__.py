"""One PyTorch language model, trained, generated with and served in one package at native speed."""

import torch

from pyllm import _C, ops

__version__: str = _C.info()["version"]
__all__ = ["ops"]

_C.set_num_threads(torch.get_num_threads())
