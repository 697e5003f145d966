"""Measurements with a network and images that take no time."""

import pytest


@pytest.fixture
def setting(monkeypatch, on_path):
    from measure import setting

    monkeypatch.setitem(setting.CASES, "resnet20", setting.Case(size=8, batch=4))
    return setting
