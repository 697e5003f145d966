import pytest

from stp_ray.config import load_config
from stp_ray.data import DataSummary
from stp_ray.elastic import Supernet
from stp_ray.errors import ConfigError
from stp_ray.stages.network import build_supernet


@pytest.fixture
def summary():
    return DataSummary([str(i) for i in range(10)], 90, 10, 20, 8, 8, 1000, False)


def test_a_pattern_that_matches_nothing_names_its_settings(summary):
    config = load_config({"space": {"only": ["layer9"]}})
    with pytest.raises(ConfigError, match=r"space\.ignore and space\.only: .*'layer9' matches no"):
        build_supernet(config, summary)


def test_what_goes_wrong_otherwise_is_not_called_a_pattern(summary, monkeypatch):
    def fails(*args, **kwargs):
        raise ValueError("lengths 8 and 9 cannot be equal")

    monkeypatch.setattr(Supernet, "trace", fails)
    with pytest.raises(ValueError, match="lengths 8 and 9") as found:
        build_supernet(load_config({}), summary)
    assert not isinstance(found.value, ConfigError)
