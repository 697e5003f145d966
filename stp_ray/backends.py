"""What storage back-ends are called, what they raise and how long they are asked. Standard library
only."""

import logging
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

log = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

#: The extra of this package that brings the back-end of a URI's scheme.
EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
    "adl": "azure",
}
#: Seconds between tries of remote storage that does not answer.
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 28.0)
#: Seconds after which no further try begins.
PATIENCE = 60.0
# Exceptions that are not OSErrors; looked up only once their library is loaded.
_FOREIGN = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
    # huggingface_hub, whichever its client is
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
)
# Mistakes of who asks, which s3fs raises like errors that pass.
_REFUSED = (
    "InvalidToken",
    "AuthorizationHeaderMalformed",
    "InvalidBucketName",
    "PermanentRedirect",
)
_MISTAKES = ("Credential", "Auth", "Profile", "Validation", "Invalid", "NoRegion")


def s3_client() -> dict[str, Any]:
    """Settings of S3's client, without tries of its own, which would lie within those of its
    callers; new ones each time, for it writes into them."""
    return {"connect_timeout": 5, "read_timeout": 30, "retries": {"total_max_attempts": 1}}


def backend_errors() -> tuple[type[Exception], ...]:
    """All that a request to storage may raise, of the back-ends that are in use."""
    loaded = [
        getattr(sys.modules[module], name) for module, name in _FOREIGN if module in sys.modules
    ]
    return (OSError, *loaded)


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: not what is missing, forbidden or misspelt, nor
    an error of anything else than a back-end."""
    if not isinstance(error, backend_errors()):
        return False
    lasting = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError)
    kind = type(error).__name__
    code = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(code, int) and 400 <= code < 500:  # of HTTP: aiohttp calls it status
        return code in (408, 429)
    answer = getattr(error.__cause__, "response", None)  # of S3, which s3fs translates
    if isinstance(answer, dict) and answer.get("Error", {}).get("Code") in _REFUSED:
        return False
    return not isinstance(error, (*lasting, NotADirectoryError)) and not any(
        word in kind for word in _MISTAKES
    )


def in_one_line(error: Exception) -> str:
    """What an error says, or its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def keep_asking(
    ask: Callable[[], _Answer],
    place: str,
    again: Callable[[Exception], bool] = may_pass,
    longer: float = 0.0,
) -> _Answer:
    """What `ask` returns, which asks remote storage. Where that does not answer it is asked again
    with growing pauses until a minute is over, for a run may be days old by then.

    Args:
        place: what is asked for, which warnings name.
        again: whether another try may succeed after an error.
        longer: seconds for which tries may begin beyond the minute.

    Raises:
        Exception: of `ask`, once it is no use to wait.
    """
    until = time.monotonic() + PATIENCE + longer
    for pause in PAUSES:
        try:
            return ask()
        except Exception as error:
            if not again(error) or time.monotonic() > until:
                raise
            log.warning("%s: %s; trying again in %g s", place, in_one_line(error), pause)
            time.sleep(pause)
    return ask()
