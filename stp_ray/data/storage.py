"""Folders of data by fsspec URI, with storage errors in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
import pyarrow as pa

from ..backends import EXTRAS, backend_errors
from ..errors import DataError, StorageError
from ..uris import refuse_credentials


def open_filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URI and the path in it (absolute where it is local).

    Back-ends take their settings from the environment; for S3 that is `AWS_ENDPOINT_URL`
    and the usual `AWS_*` variables.

    Raises:
        DataError: the protocol is unknown or its package is not installed.
        StorageError: the URI carries credentials.
    """
    refuse_credentials(uri)
    try:
        return fsspec.core.url_to_fs(uri)
    except ImportError as error:
        protocol = uri.partition("://")[0]
        extra = EXTRAS.get(protocol)
        remedy = f'pip install "stp_ray[{extra}]"' if extra else f"install the {protocol} back-end"
        raise DataError(
            f"data.uri {uri} needs a package that is not installed ({error}); "
            f"expected fsspec's back-end for {protocol}://; {remedy}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"data.uri {uri} cannot be opened ({error}); expected a folder or an fsspec URI "
            "such as s3://bucket/folder; change data.uri"
        ) from error


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Turn what storage raises while `uri` is read into one DataError."""
    try:
        yield
    except (*backend_errors(), pa.ArrowException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{uri} cannot be read ({reason}); expected readable data; check data.uri, "
            "the endpoint and the permissions"
        ) from error


@contextmanager
def writing(uri: str) -> Iterator[None]:
    """Turn what storage raises while `uri` is written into one StorageError."""
    try:
        yield
    except (*backend_errors(), pa.ArrowException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StorageError(
            f"{uri} cannot be written ({reason}); expected storage that may be written to; check "
            "the URI, the endpoint and the permissions"
        ) from error
