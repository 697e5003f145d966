"""What Ray says that a person who runs a local cluster can do nothing about."""

import logging


def driver() -> None:
    """Token authentication is on by default, which Ray tells at every start."""
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)


def worker() -> None:
    """Ray Train asks the dashboard about its controller once a second; where there is none it
    tells so every time."""
    cleaner = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(cleaner).setLevel(logging.ERROR)
