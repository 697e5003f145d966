import logging
import threading

import pytest
from ray.train.v2._internal.execution.controller import placement_group_cleaner as cleaner

from stp_ray.stages import quiet


@pytest.mark.parametrize(
    ("name", "told"), [("PlacementGroupCleanerMonitor", []), ("another", ["lost"])]
)
def test_only_the_cleaner_ends_in_silence(monkeypatch, name, told):
    heard = []
    monkeypatch.setattr(threading, "excepthook", lambda error: heard.append(str(error.exc_value)))
    monkeypatch.setattr(cleaner.logger, "level", logging.INFO)
    quiet.worker()
    assert not cleaner.logger.isEnabledFor(logging.WARNING)

    def lose():
        raise ConnectionError("lost")

    thread = threading.Thread(target=lose, name=name)
    thread.start()
    thread.join()
    assert heard == told
