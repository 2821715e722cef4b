import os
from pathlib import Path

import hypothesis
import pytest
import torch

from pyllm import _C

hypothesis.settings.register_profile("pyllm", deadline=None)  # no test of the clock
hypothesis.settings.load_profile("pyllm")


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


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that lies beside the repository, or where PYLLM_SHARED_DATA says."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PYLLM_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"needs the real data of {folder}")
    return folder
