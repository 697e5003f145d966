"""What storage back-ends are called and what they raise. Standard library only."""

import sys

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


def backend_errors() -> tuple[type[Exception], ...]:
    """All that a request to storage may raise, of the back-ends that are in use."""
    loaded = [
        getattr(sys.modules[module], name) for module, name in _FOREIGN if module in sys.modules
    ]
    return (OSError, *loaded)
