import pytest
import torch

from pyllm import _C


@pytest.fixture(params=_C.info()["isas"])
def isa(request):
    """Runs the test once for each instruction set of this machine."""
    chosen = _C.info()["isa"]
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(chosen)


@pytest.fixture
def threads():
    """A function that sets the number of threads; the number is put back at the end."""
    before = _C.num_threads()
    yield _C.set_num_threads
    _C.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
