"""What a URI may contain. Standard library only, so that every layer can ask."""

import os
import re
from typing import Any
from urllib.parse import parse_qsl

from .errors import StorageError

_SECRET_KEY = re.compile(
    r"^sig$|signature|token|secret|passw|credential|(access|api|account)[-_]?key", re.IGNORECASE
)
_BUCKETS = {"s3", "s3a", "gs", "gcs"}
_LOCAL = {"", "file", "local"}
#: An S3 access point stands where a bucket does.
_ACCESS_POINT = re.compile(r"arn:aws[\w-]*:s3[\w-]*:[\w-]*:\d*:(accesspoint|outpost)(:[\w-]+)*")

HOW_TO_MEND = (
    "expected a URI without credentials; give them through the environment "
    "(for example AWS_ACCESS_KEY_ID) or the machine's role"
)


def credentials_in(uri: str) -> str | None:
    """Which kind of credential a URI carries, or None. A plain path carries none.

    URIs end up in config.json, logs and reports, so a secret in one would be published.
    The answer never repeats the secret.
    """
    # fsspec chains URIs with "::"; each link is looked at.
    for link in uri.split("::"):
        scheme, separator, rest = link.partition("://")
        if not separator:
            continue
        # A secret may hold "/", which ends the host part for a standard parser.
        before_at = rest.rpartition("@")[0]
        host = rest.partition("/")[0]
        if _ACCESS_POINT.fullmatch(host):
            host = before_at = ""
        if ":" in before_at.partition("/")[0] or (scheme.lower() in _BUCKETS and ":" in host):
            return "a user name with a password, or an access key"
        for key, value in parse_qsl(rest.partition("?")[2]):
            if value and _SECRET_KEY.search(key):
                return f"the query parameter {key!r}"
    return None


def refuse_credentials(uri: str) -> None:
    """Raise StorageError if the URI carries a password, a key or a signature."""
    found = credentials_in(uri)
    if found:
        scheme = uri.partition("://")[0]
        raise StorageError(f"a {scheme}:// URI contains {found}; {HOW_TO_MEND}")


def absolute(filesystem: Any, path: str, uri: str) -> str:
    """The URI of a path, by which other processes find the same place.

    Args:
        filesystem: fsspec's, of `uri`.
        path: in it.
        uri: what the path was taken from.
    """
    scheme, _, rest = uri.partition("://")
    host, found = rest.partition("/")[0], str(filesystem.unstrip_protocol(path))
    if "@" in host and scheme.lower() not in _LOCAL:  # account or user, which back-ends forget
        return uri.rstrip("/")
    if scheme.lower() in {*_LOCAL, "memory"} or not host or f"://{host}" in found:
        return found
    return f"{scheme}://{host}/{path.strip('/')}"  # paths of HDFS or SFTP say nothing of it


def local_path(uri: str) -> str | None:
    """The path of a local file or folder, given as such or by `file:`; None for other storage."""
    path = re.sub(r"^(file|local):(//)?", "", uri)
    return None if "://" in path or "::" in path else os.path.expanduser(path)


def from_root(uri: str) -> str:
    """The same with a local path, or that of the archive that it looks into, from the root of the
    file system on, for processes in other folders."""
    *within, outermost = uri.split("::")
    path = local_path(outermost)
    return uri if path is None else "::".join([*within, os.path.abspath(path)])


def refuse_detours(uri: str) -> None:
    """Raise StorageError if files named below a URI could land elsewhere than below it, or if it
    is a URI of no place, which would be a local folder of that name.

    A folder may be given relative to the current one ("../runs"), but not as a way that leads
    back; a remote URI may not hold what a back-end would resolve or take for a pattern.
    """
    scheme, separator, rest = uri.partition("://")
    if (separator and not rest) or re.match(r"(?!file:|local:)[A-Za-z][\w+.-]+:/(?!/)", uri):
        raise StorageError(
            f"the storage {uri!r} names no bucket or folder; expected a URI such as "
            "s3://bucket/folder; a variable in it may be empty, or a slash missing"
        )
    local = not separator or scheme.lower() in ("file", "local")
    segments = (rest if separator else uri).split("/")
    if not separator:
        while segments and segments[0] in (".", ".."):
            segments.pop(0)
    found = None
    if ".." in segments:
        found = "'..'"
    elif "::" in uri:
        found = "'::'"
    elif "://" in rest:
        found = "'://' twice"
    elif not uri.isprintable():
        found = "a control character"
    elif not local and (odd := re.search(r"[*?\[\]\\]", rest)):
        found = f"{odd[0]!r}"
    elif not local and "." in segments:
        found = "'.'"
    if found:
        raise StorageError(
            f"the storage {uri!r} contains {found}; expected the plain path of a folder, or a URI "
            "such as s3://bucket/folder; write out the folder that is meant"
        )
