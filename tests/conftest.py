"""Fixtures of all tests: instruction sets, thread counts, seeded randomness."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from longattn import _core

settings.register_profile(
    "ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("ci")

ISAS = _core.available_isas()


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once on every instruction set of this CPU."""
    before = _core.isa()
    _core.set_isa(request.param)
    yield request.param
    _core.set_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request):
    """Runs the test once on one thread and once on two."""
    before = _core.num_threads()
    _core.set_num_threads(request.param)
    yield request.param
    _core.set_num_threads(before)


@pytest.fixture
def rng():
    """Random numbers, the same in every run."""
    return np.random.default_rng(20240229)


@pytest.fixture
def one_torch_thread():
    """Runs torch's side of the test on one thread."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
