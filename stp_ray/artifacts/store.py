"""One folder on any fsspec storage: atomic, never pickled."""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
from fsspec.asyn import AsyncFileSystem
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from ..backends import EXTRAS, backend_errors, keep_asking, s3_client
from ..errors import StorageError
from ..uris import absolute, refuse_credentials, refuse_detours
from . import local

log = logging.getLogger(__name__)

#: Seconds for which a file that is written may stay without an answer, and one more for each so
#: many bytes. Back-ends have time-outs of their own for what they read, which do not count before
#: the whole file is sent; and S3's clients ask first whether it is wanted.
STALLED = 30.0
SLOWEST = 128 * 1024

_SEGMENT = re.compile(r"[A-Za-z0-9_=-][A-Za-z0-9._=-]*")


class Store:
    """One folder on local disk or object storage.

    Names are relative, in segments of letters, digits and `._=-`, separated by "/". Every
    write is atomic: a reader sees the old content or the new, never a part. Pickles as its
    URI, so it can be handed to another process.

    Args:
        uri: a folder, or an fsspec URI such as "s3://bucket/folder". For s3,
            AWS_ENDPOINT_URL is honoured. Credentials in the URI are refused.

    Raises:
        StorageError: the back-end is unknown or not installed, or the URI holds credentials or
            what could lead out of it.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        try:
            text = os.fspath(uri)
        except TypeError:
            raise StorageError(f"the storage is {uri!r:.60}; expected a folder or a URI") from None
        refuse_credentials(text)
        if not text:
            raise StorageError("the storage is empty; expected a folder or a URI")
        refuse_detours(text)
        self._fs, path = _open_filesystem(text)
        if isinstance(self._fs, LocalFileSystem):
            path = os.path.abspath(path)  # without the ".." of "../runs"
        self._path = path.rstrip("/")
        self._uri = absolute(self._fs, self._path, text).rstrip("/")
        self._patient = not isinstance(self._fs, LocalFileSystem)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.uri,)

    @property
    def uri(self) -> str:
        """The absolute URI, "file:///..." for local folders."""
        return self._uri

    @property
    def local_path(self) -> Path | None:
        """The folder itself where the store is on a local file system, else None."""
        return Path(self._path) if isinstance(self._fs, LocalFileSystem) else None

    def child(self, *names: str) -> "Store":
        """A folder within this one. Nothing is created until something is written."""
        return Store("/".join([self._uri, *map(_checked, names)]))

    # -- bytes ----------------------------------------------------------------------

    def write_bytes(self, name: str, data: bytes) -> str:
        """Write a file atomically and return its sha256 as hexadecimal digits."""
        path = self._at(name)
        with self._explained("write", name):
            if self.local_path is None:
                self._put(path, data)  # visible when complete
            else:
                local.replace_file(Path(path), data)
        return hashlib.sha256(data).hexdigest()

    def create_bytes(self, name: str, data: bytes) -> bool:
        """Write a file that must not be there yet: of all that try at once, one succeeds.

        Args:
            name: the file.
            data: what nobody else would write, so that a request that was answered and whose
                answer was lost is recognised when it is tried again.

        Returns:
            Whether the file is this caller's; False if another one wrote it before.
        """
        path = self._at(name)
        with self._explained("create", name):
            try:
                if self.local_path is None:
                    self._put(path, data, mode="create")
                else:
                    local.create_file(Path(path), data)
            except OSError:  # each back-end has its own for a condition that does not hold
                if not self._call("exists", path):
                    raise
                return bool(self._call("cat_file", path) == data)
        return True

    def read_bytes(self, name: str) -> bytes:
        """The content of a file."""
        with self._explained("read", name):
            return bytes(self._call("cat_file", self._at(name)))

    def checksum(self, name: str) -> str:
        """The sha256 of a file's content, as hexadecimal digits."""
        return hashlib.sha256(self.read_bytes(name)).hexdigest()

    def exists(self, name: str) -> bool:
        """Whether a file or a folder of this name exists."""
        with self._explained("look for", name):
            try:  # fsspec's own `exists` takes every error of a disk, or of SFTP, for "no"
                if self.local_path is None:
                    self._call("info", self._at(name))
                else:
                    os.stat(self._at(name))
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def names(self, prefix: str = "") -> list[str]:
        """Names of the files and folders directly in this folder, sorted; [] without it."""
        with self._explained("list", prefix):
            try:
                found = self._call("ls", self._path, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        # S3's console makes a folder by an empty file of its name.
        paths = {str(path).rstrip("/") for path in found} - {self._path.rstrip("/")}
        names = {path.rpartition("/")[2] for path in paths}
        # A temporary file of a write that was killed begins with a dot.
        return sorted(n for n in names if n.startswith(prefix) and _SEGMENT.fullmatch(n))

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all it holds. Nothing happens without it."""
        with self._explained("delete", name), contextlib.suppress(FileNotFoundError):
            self._call("rm", self._at(name), recursive=True)

    # -- formats --------------------------------------------------------------------

    def write_json(self, name: str, content: Any) -> str:
        """Write JSON (a non-finite number becomes null) and return the sha256."""
        text = json.dumps(jsonable(content), indent=2, ensure_ascii=False, allow_nan=False)
        return self.write_bytes(name, (text + "\n").encode())

    def read_json(self, name: str) -> Any:
        """The content of a JSON file."""
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise StorageError(
                f"{self.uri}/{name} is not JSON ({error}); it was damaged or written by something "
                "else; delete it to have it made again"
            ) from None

    def write_table(self, name: str, table: pa.Table | Sequence[Mapping[str, Any]]) -> str:
        """Write a table (or a list of rows) as Parquet and return the sha256."""
        if not isinstance(table, pa.Table):
            table = pa.Table.from_pylist([dict(row) for row in table])
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        return self.write_bytes(name, buffer.getvalue())

    def read_table(self, name: str) -> pa.Table:
        """The content of a Parquet file."""
        data = self.read_bytes(name)
        try:
            return pq.read_table(pa.BufferReader(data))
        except (pa.ArrowException, OSError) as error:  # much damage is an OSError to Arrow
            raise StorageError(
                f"{self.uri}/{name} is not a Parquet file ({first_line(error)}); delete it to "
                "have it made again"
            ) from None

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        """Write tensors of any device as safetensors and return the sha256.

        Tensors that share memory are written as separate copies.
        """
        flat: dict[str, Tensor] = {}
        seen: set[int] = set()
        for key, tensor in tensors.items():
            plain = tensor.detach().cpu().contiguous()
            place = plain.untyped_storage().data_ptr()
            if place in seen:
                plain = plain.clone()
            seen.add(place)
            flat[key] = plain
        return self.write_bytes(name, safetensors.torch.save(flat))

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file, on the CPU."""
        return tensors_of(self.read_bytes(name), f"{self.uri}/{name}")

    # -- checks ---------------------------------------------------------------------

    def probe(self) -> None:
        """Write, read and delete markers; leaves nothing behind, folders included. Storage that
        does not answer is not waited for: before a run begins it is most often a wrong address.
        Warns of storage in which two drivers could not keep out of each other's way.

        Raises:
            StorageError: the storage cannot be used; one line saying why.
        """
        missing: list[Path] = []
        if self.local_path is not None:
            folders = [self.local_path, *self.local_path.parents]
            missing = [folder for folder in folders if not folder.exists()]
        name = f"probe-{uuid.uuid4().hex}"
        patient, self._patient = self._patient, False
        try:
            self.write_bytes(name, name.encode())
            if self.read_bytes(name) != name.encode():
                raise StorageError(
                    f"storage {self.uri} gives back something else than was written; expected a "
                    "consistent file system; choose another storage"
                )
            if self.create_bytes(name, b"another"):
                log.warning(
                    "storage %s replaces files that were to be created (it knows no "
                    "If-None-Match); nothing keeps two drivers from one run: start one alone",
                    self.uri,
                )
            self.delete(name)
        finally:
            self._patient = patient
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    # -- internals ------------------------------------------------------------------

    def _put(self, path: str, data: bytes, **options: Any) -> None:
        if isinstance(self._fs, AsyncFileSystem):
            options["timeout"] = STALLED + len(data) / SLOWEST
        self._call("pipe_file", path, data, **options)

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call the back-end, and again after a pause where remote storage did not answer."""
        ask = partial(self._ask, method, *arguments, **options)
        if not self._patient:
            return ask()
        # a large file that is given up is sent once more at least
        longer = options.get("timeout", STALLED) - STALLED
        return keep_asking(ask, self.uri, longer=longer)

    def _ask(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            return getattr(self._fs, method)(*arguments, **options)
        except FSTimeoutError as error:  # which says nothing
            raise TimeoutError("no answer in time") from error
        except RuntimeError as error:  # adlfs hides behind it what a deletion ended with
            if isinstance(error.__cause__, backend_errors()):
                raise error.__cause__ from None
            raise

    def _at(self, name: str) -> str:
        return f"{self._path}/{_checked(name)}"

    @contextlib.contextmanager
    def _explained(self, action: str, name: str) -> Iterator[None]:
        try:
            yield
        except backend_errors() as error:
            what = f"{self.uri}/{name}" if name else self.uri
            raise StorageError(f"cannot {action} {what}: {_reason(error)}") from error


def _open_filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    scheme = uri.partition("://")[0].lower() if "://" in uri else "file"
    options: dict[str, Any] = {}
    if scheme != "file":
        # Other processes write too: a remembered listing would be out of date.
        options["use_listings_cache"] = False
    if scheme in ("s3", "s3a"):
        options["config_kwargs"] = s3_client()  # s3fs and `Store` try again
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            options["endpoint_url"] = endpoint
    try:
        filesystem, path = fsspec.url_to_fs(uri, **options)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        cure = f"pip install stp_ray[{extra}]" if extra else "install its fsspec package"
        raise StorageError(
            f"storage {uri} needs a package that is not installed ({first_line(error)}); {cure}"
        ) from None
    except (ValueError, OSError) as error:  # OSError: pyarrow's, without the libraries of hdfs
        raise StorageError(
            f"storage {uri} cannot be used: {first_line(error)}; expected a folder or a URI such "
            "as s3://, gs:// or az://"
        ) from None
    return filesystem, str(path)


def _checked(name: str) -> str:
    if not all(_SEGMENT.fullmatch(segment) for segment in name.split("/")):
        raise StorageError(
            f"the name {name!r} cannot be used in a store; expected relative segments of letters, "
            "digits and ._=- that do not begin with a dot"
        )
    return name


def tensors_of(data: bytes, source: str) -> dict[str, Tensor]:
    """The tensors of what was read from a safetensors file, on the CPU."""
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise StorageError(
            f"{source} is not a safetensors file ({first_line(error)}); it was damaged or written "
            "by something else; delete it to have it made again"
        ) from None


def jsonable(content: Any) -> Any:
    """The same content with non-finite numbers as null, and one-element arrays as numbers."""
    if isinstance(content, Mapping):
        return {str(key): jsonable(value) for key, value in content.items()}
    if isinstance(content, list | tuple | set | frozenset):
        return [jsonable(value) for value in content]
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if hasattr(content, "item"):
        return jsonable(content.item())
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it does not exist; check the bucket, the folder and the name"
    if isinstance(error, PermissionError):
        return f"permission denied ({first_line(error)}); check the access rights"
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """What an error says first, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
