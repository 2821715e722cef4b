"""One PyTorch language model, trained, generated with and served in one package at native speed."""

import torch

from pyllm import _C, ops, reference

__version__: str = _C.info()["version"]
__all__ = ["ops", "reference"]

_C.set_num_threads(torch.get_num_threads())
