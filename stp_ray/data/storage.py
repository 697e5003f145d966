"""Folders of data by fsspec URI, with storage errors in one line."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from .. import backends
from ..backends import EXTRAS, backend_errors, in_one_line
from ..errors import DataError, StorageError
from ..uris import refuse_credentials

_Answer = TypeVar("_Answer")


def files_below(filesystem: Any, folder: str) -> list[str]:
    """Paths of all files below a folder. Linked local folders count, except for links that lead
    back to where they are: fsspec passes over them, and over those that cannot be read.

    Raises:
        OSError: a local folder cannot be read.
    """
    if not isinstance(filesystem, LocalFileSystem):
        return [str(path) for path in filesystem.find(folder) if not path.endswith("/")]
    found: list[str] = []
    above = {folder: frozenset[str]()}  # of each folder to come, those that it lies in
    for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        found += [os.path.join(place, file) for file in files]
        way = above.pop(place) | {os.path.realpath(place)}
        inside = {name: os.path.join(place, name) for name in folders}
        folders[:] = [name for name, path in inside.items() if os.path.realpath(path) not in way]
        above.update((inside[name], way) for name in folders)
    return found


def _refuse(error: OSError) -> None:
    raise error


def open_filesystem(uri: str, *, written: bool = False) -> tuple[Any, str]:
    """The fsspec filesystem of a URI and the path in it (absolute where it is local).

    Back-ends take their settings from the environment; for S3 that is `AWS_ENDPOINT_URL`
    and the usual `AWS_*` variables.

    Args:
        uri: of a folder or file.
        written: whether it is written to. What is read from S3 is asked for once: `patiently` tries
            again, and tries within tries would take a quarter of an hour.

    Raises:
        DataError: the protocol is unknown, its package is not installed, or its back-end cannot be
            set up or reached.
        StorageError: the URI carries credentials.
    """
    refuse_credentials(uri)
    *outer, inner = [link.partition("://")[0] for link in uri.split("::")]
    if misplaced := EXTRAS.keys() & {*outer}:
        raise DataError(
            f"data.uri {uri} has {min(misplaced)} before '::'; expected an archive or a cache "
            "there, such as zip://::s3://bucket/set.zip; change data.uri"
        )
    options = {s: {"config_kwargs": backends.s3_client()} for s in {inner} & {"s3", "s3a"}}
    try:
        if written:
            return fsspec.core.url_to_fs(uri)
        holder, path = fsspec.core.url_to_fs(uri.rpartition("::")[2], **options)
        if options:
            holder.retries = 1
        if "::" not in uri:
            return holder, path
        # An archive is looked into when it is opened.
        return patiently(holder, uri, partial(fsspec.core.url_to_fs, uri, **options))
    except ImportError as error:
        protocol = uri.partition("://")[0]
        extra = EXTRAS.get(protocol)
        remedy = f'pip install "stp_ray[{extra}]"' if extra else f"install the {protocol} back-end"
        raise DataError(
            f"data.uri {uri} needs a package that is not installed ({in_one_line(error)}); "
            f"expected fsspec's back-end for {protocol}://; {remedy}"
        ) from error
    except Exception as error:  # each back-end has its own, and archives are opened at once
        raise DataError(
            f"data.uri {uri} cannot be opened ({in_one_line(error)}); expected a folder or an "
            "fsspec URI such as s3://bucket/folder; change data.uri"
        ) from error


def patiently(filesystem: Any, path: str, ask: Callable[[], _Answer]) -> _Answer:
    """What `ask` returns, which reads a path of a filesystem: `backends.keep_asking`, except of a
    local disk, which is asked once. What looks damaged is looked at twice: a connection that was
    cut may be the reason.

    Raises:
        Exception: what storage raises, once it is no use to wait.
    """
    if isinstance(_holder(filesystem), LocalFileSystem):
        return ask()
    looked = False

    def again(error: Exception) -> bool:
        nonlocal looked
        if not _looks_damaged(error):
            return backends.may_pass(error)
        first, looked = not looked, True
        return first

    return backends.keep_asking(ask, path, again)


def _looks_damaged(error: Exception) -> bool:
    """Whether it is Arrow's, of what was read: an OSError that tells neither kind nor cause, as
    storage does."""
    unnamed = type(error) is OSError and error.errno is None and error.__context__ is None
    return unnamed or isinstance(error, pa.ArrowException)


def _holder(filesystem: Any) -> Any:
    """Itself, or what an archive lies in."""
    return getattr(getattr(filesystem, "fo", None), "fs", filesystem)


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """Turn what storage raises while `uri` is read into one DataError."""
    try:
        yield
    except (*backend_errors(), pa.ArrowException) as error:
        raise DataError(
            f"{uri} cannot be read ({in_one_line(error)}); expected readable data; check data.uri, "
            "the endpoint and the permissions"
        ) from error


@contextmanager
def writing(uri: str) -> Iterator[None]:
    """Turn what storage raises while `uri` is written into one StorageError."""
    try:
        yield
    except (*backend_errors(), pa.ArrowException) as error:
        raise StorageError(
            f"{uri} cannot be written ({in_one_line(error)}); expected storage that may be "
            "written to; check the URI, the endpoint and the permissions"
        ) from error
