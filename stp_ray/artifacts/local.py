"""Files on a local disk that are there whole or not at all."""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

#: What a file system without hard links says of one.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def replace_file(path: Path, data: bytes) -> None:
    """Write a file: whoever reads it sees the old content or the new."""
    with _written_beside(path, data) as temporary:
        os.replace(temporary, path)


def create_file(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, or raise `FileExistsError`."""
    with _written_beside(path, data) as temporary:
        try:
            os.link(temporary, path)  # fails where a rename would replace
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with path.open("xb") as file:  # as exclusive; others may see a part of it
                file.write(data)
                file.flush()
                os.fsync(file.fileno())


@contextlib.contextmanager
def _written_beside(path: Path, data: bytes) -> Iterator[Path]:
    """A temporary file of this content, safe on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
