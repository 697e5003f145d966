import gc
from collections.abc import Iterator

import pytest
import torch

from stp_ray.elastic.attention import unfused_attention


@pytest.fixture(scope="session", autouse=True)
def imported_once() -> Iterator[None]:
    """What has been imported is never garbage: without it a collection takes milliseconds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def freed(imported_once: None) -> Iterator[None]:
    """The weights of a test are gone before the next one. The nodes of a traced graph know it and
    it knows them, a cycle that Python would leave until it had piled up gigabytes of tensors."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def one_way_to_compute():
    """One thread, and no fast path of attention, into which the counter does not see."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with unfused_attention():
        yield
    torch.set_num_threads(threads)
