"""What Ray says that a person who runs a local cluster can do nothing about."""

import logging
import threading


def driver() -> None:
    """Token authentication is on by default, which Ray tells at every start."""
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)


#: Ray Train's thread that asks the dashboard about the controller of a training, and its logger.
_CLEANER = "PlacementGroupCleanerMonitor"
_CLEANERS_LOG = "ray.train.v2._internal.execution.controller.placement_group_cleaner"


def worker() -> None:
    """Where there is no dashboard, the cleaner tells so once a second; where there are two clusters
    on the machine, it ends in a traceback. There is nothing to clean where the cluster ends with
    the run."""
    logging.getLogger(_CLEANERS_LOG).setLevel(logging.ERROR)
    told = threading.excepthook

    def unless_it_is_the_cleaner(error: threading.ExceptHookArgs) -> None:
        if error.thread is None or error.thread.name != _CLEANER:
            told(error)

    threading.excepthook = unless_it_is_the_cleaner
