"""What workers tell the driver."""

from stp_ray.errors import RunError
from stp_ray.stages.relay import Relay


def test_an_error_of_one_stage_is_not_that_of_another():
    """A budget that failed must not end the others."""
    relay, first = Relay(), RunError("the loss is not finite")
    assert relay.error() is None
    relay.fail("finalize/0.3", first)
    relay.fail("finalize/0.3", RunError("later"))
    relay.fail("finalize/0.15", RunError("another"))
    assert relay.error("finalize/0.5") is None
    assert relay.error("finalize/0.3") is first
    assert relay.error() is first, "the first of all"
