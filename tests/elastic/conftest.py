import pytest
import torch
from hypothesis import settings

# the first example of a test may import or compile; time is pytest's affair
settings.register_profile("elastic", deadline=None)
settings.load_profile("elastic")


@pytest.fixture(scope="module")
def one_way_to_compute():
    """One thread, and no fast path of attention, into which the counter does not see."""
    enabled, threads = torch.backends.mha.get_fastpath_enabled(), torch.get_num_threads()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_num_threads(1)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)
    torch.set_num_threads(threads)
