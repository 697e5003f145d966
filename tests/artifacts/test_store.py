"""One folder on any storage."""

import errno
import hashlib
import os
import pickle
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from stp_ray import backends, uris
from stp_ray.artifacts import Store, local
from stp_ray.errors import StorageError

pytestmark = pytest.mark.timeout(120)


def test_a_file_is_created_once(store):
    assert store.create_bytes("a.json", b"first")
    assert not store.create_bytes("a.json", b"second")
    assert store.read_bytes("a.json") == b"first"
    assert store.create_bytes("a.json", b"first"), "a request tried again is its own"


def test_of_many_that_create_a_file_one_succeeds(store):
    def create(place):
        return store.create_bytes("lease.json", f"owner {place}".encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    assert won.count(True) == 1
    assert store.read_bytes("lease.json") == f"owner {won.index(True)}".encode()


def test_a_file_is_created_once_without_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    store = Store(tmp_path)
    store.probe()
    assert store.create_bytes("a.json", b"first")
    assert not store.create_bytes("a.json", b"second")
    assert store.names() == ["a.json"] and store.read_bytes("a.json") == b"first"


def test_storage_that_replaces_what_is_to_be_created_is_warned_of(tmp_path, monkeypatch, caplog):
    store = Store(tmp_path)
    store.probe()
    assert caplog.text == ""
    monkeypatch.setattr(local, "create_file", local.replace_file)
    store.probe()
    assert "nothing keeps two drivers from one run" in caplog.text
    assert store.names() == []


def test_a_disk_that_does_not_answer_is_not_an_absent_file(tmp_path, monkeypatch):
    """Or training would begin anew, beside a checkpoint that is there."""
    store = Store(tmp_path)
    store.write_bytes("a.bin", b"there")
    assert not store.exists("a.bin/b")

    def stat(path, **more):
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("stp_ray.artifacts.store.os.stat", stat)
        with pytest.raises(StorageError, match="Input/output error"):
            store.exists("a.bin")
    assert store.exists("a.bin")


def test_a_back_end_that_does_not_answer_is_not_an_absent_file(monkeypatch):
    """That of fsspec's own `exists`, which SFTP has, says no."""
    store = Store(f"memory://{uuid.uuid4().hex}")
    store.write_bytes("a.bin", b"there")
    monkeypatch.setattr(backends, "PAUSES", ())

    def info(*_, **__):
        raise ConnectionResetError(104, "Connection reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "info", info)
        with pytest.raises(StorageError, match="Connection reset by peer"):
            store.exists("a.bin")
    assert store.exists("a.bin") and not store.exists("b.bin")


def test_bytes_come_back(store):
    digest = store.write_bytes("a/b.bin", b"first")
    assert digest == hashlib.sha256(b"first").hexdigest() == store.checksum("a/b.bin")
    store.write_bytes("a/b.bin", b"second")
    assert store.read_bytes("a/b.bin") == store.child("a").read_bytes("b.bin") == b"second"
    assert store.exists("a/b.bin")
    assert store.exists("a")
    assert not store.exists("c")


def test_names_are_sorted_direct_and_current(store):
    assert store.names() == []
    other = Store(store.uri)
    store.write_bytes("part-2.json", b"2")
    assert other.names() == ["part-2.json"]
    store.write_bytes("part-1.json", b"1")
    store.write_bytes("folder/inner.json", b"0")
    assert other.names() == ["folder", "part-1.json", "part-2.json"]
    assert other.names("part-") == ["part-1.json", "part-2.json"]


def test_files_and_folders_are_deleted(store):
    store.write_bytes("keep", b"")
    store.write_bytes("folder/a", b"a")
    store.write_bytes("folder/deep/b", b"b")
    store.delete("folder")
    store.delete("absent")
    assert not store.exists("folder/deep/b")
    assert store.names() == ["keep"]
    store.delete("keep")
    assert not store.exists("keep")


def test_json_and_tables_come_back(store):
    store.write_json("a.json", {"loss": float("nan"), "top1": torch.tensor(3.5), "all": (1, 2)})
    assert store.read_json("a.json") == {"loss": None, "top1": 3.5, "all": [1, 2]}
    rows = [{"id": "a", "macs": 1}, {"id": "b", "macs": 2}]
    store.write_table("rows.parquet", rows)
    assert store.read_table("rows.parquet").to_pylist() == rows
    table = pa.table({"x": [1.5]})
    store.write_table("table.parquet", table)
    assert store.read_table("table.parquet") == table


def test_tensors_come_back_to_the_bit(store):
    weights = torch.randn(4, 6)
    tensors = {
        "weights": weights,
        "shared": weights,
        "slice": weights[:, 1:3],
        "half": torch.randn(3).to(torch.bfloat16),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "empty too": torch.zeros(0),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    digest = store.save_tensors("t.safetensors", tensors)
    assert digest == store.checksum("t.safetensors")
    loaded = store.load_tensors("t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_what_is_missing_or_damaged_is_told_in_one_line(store):
    store.write_bytes("junk", b"junk")
    for read, told in (
        (lambda: store.read_bytes("absent"), "does not exist"),
        (lambda: store.read_json("junk"), "is not JSON"),
        (lambda: store.read_table("junk"), "is not a Parquet file"),
        (lambda: store.load_tensors("junk"), "is not a safetensors file"),
    ):
        with pytest.raises(StorageError, match=told) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert store.uri in str(caught.value)


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=40))
def test_no_damage_of_a_table_is_a_bare_error(where, damage):
    store = Store("memory://damaged")
    store.write_table("a.parquet", [{"id": f"{n}", "score": n / 7} for n in range(50)])
    content = bytearray(store.read_bytes("a.parquet"))
    where %= len(content)
    content[where : where + len(damage)] = damage
    store.write_bytes("a.parquet", bytes(content))
    try:
        store.read_table("a.parquet")
    except StorageError as error:
        assert f"{store.uri}/a.parquet is not a Parquet file" in str(error)


def test_an_error_that_a_back_end_hides_behind_another_is_tried_again_and_told(monkeypatch):
    """As adlfs does where a deletion fails."""
    store, refused = Store("memory://hidden"), []

    def rm(path, **_):
        refused.append(path)
        raise RuntimeError("Failed to delete") from OSError(5, "connection reset")

    monkeypatch.setattr(store._fs, "rm", rm)
    monkeypatch.setattr(backends, "PAUSES", (0.0, 0.0))
    with pytest.raises(StorageError, match=r"cannot delete .*connection reset"):
        store.delete("a.json")
    assert len(refused) == 3


@pytest.mark.parametrize(("code", "tries"), [(401, 1), (404, 1), (408, 3), (429, 3), (503, 3)])
def test_an_answer_of_http_is_asked_for_again_only_where_it_may_change(monkeypatch, code, tries):
    """gcsfs raises those that it has no better word for."""

    class HttpError(Exception):
        def __init__(self):
            super().__init__("the server said so")
            self.code = code

    monkeypatch.setitem(sys.modules, "gcsfs.retry", SimpleNamespace(HttpError=HttpError))
    store, asked = Store("memory://http"), []

    def cat_file(path):
        asked.append(path)
        raise HttpError

    monkeypatch.setattr(store._fs, "cat_file", cat_file)
    monkeypatch.setattr(backends, "PAUSES", (0.0, 0.0))
    with pytest.raises(StorageError, match=r"cannot read .*HttpError: the server said so"):
        store.read_bytes("a.json")
    assert len(asked) == tries


def test_a_probe_leaves_nothing(store):
    store.probe()
    assert store.names() == []


def test_a_store_travels_as_its_uri(store):
    store.write_bytes("a", b"a")
    copy = pickle.loads(pickle.dumps(store))
    assert copy == store
    assert hash(copy) == hash(store)
    assert copy.read_bytes("a") == b"a"
    assert repr(store) == f"Store({store.uri!r})"


@pytest.mark.parametrize(
    "name",
    ["", "../x", "a/../b", "/etc/passwd", "a//b", ".hidden", "a b", "a\\b", "s3://b/c", "a/"],
)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    store = Store(tmp_path)
    for use in (store.read_bytes, store.exists, store.delete, store.child):
        with pytest.raises(StorageError, match="cannot be used in a store"):
            use(name)


def test_a_uri_keeps_the_account_that_a_back_end_forgets():
    """As adlfs does, which gives back abfs://container/path and asks the environment."""
    filesystem = SimpleNamespace(unstrip_protocol=lambda path: f"abfs://{path}")
    host = "abfss://runs@other.dfs.core.windows.net"
    assert uris.absolute(filesystem, "runs/x", f"{host}/x/") == f"{host}/x"
    assert uris.absolute(filesystem, "runs", host).rstrip("/") == host
    assert uris.absolute(filesystem, "runs/x", "az://runs/x") == "abfs://runs/x"


@pytest.mark.parametrize(
    ("uri", "path", "found"),
    [
        ("webhdfs://namenode:9870/runs/x", "/runs/x", "webhdfs://namenode:9870/runs/x"),
        ("hdfs://namenode/runs", "/runs", "hdfs://namenode/runs"),
        ("hdfs://data/data/x", "/data/x", "hdfs://data/data/x"),
        ("memory://runs/x", "/runs/x", "memory:///runs/x"),
        ("s3://bucket/runs", "bucket/runs", "s3://bucket/runs"),
        ("hdfs:///runs", "/runs", "hdfs:///runs"),
        ("runs", "/here/runs", "file:///here/runs"),
        ("file://runs", "/here/runs", "file:///here/runs"),
        ("file://me@home/x", "/here/me@home/x", "file:///here/me@home/x"),
        ("sftp://data@nas/data/set", "/data/set", "sftp://data@nas/data/set"),
        ("hdfs://me@namenode/runs/", "/runs", "hdfs://me@namenode/runs"),
    ],
)
def test_a_uri_keeps_the_host_that_paths_say_nothing_of(uri, path, found):
    scheme = uri.partition("://")[0] if "://" in uri else "file"
    filesystem = SimpleNamespace(unstrip_protocol=lambda path: f"{scheme}://{path}")
    assert uris.absolute(filesystem, path, uri) == found


def test_a_folder_that_a_console_has_made_is_not_in_itself(s3):
    boto3 = pytest.importorskip("boto3")
    bucket, name = s3.removeprefix("s3://"), uuid.uuid4().hex
    for key in ("", "inner/"):
        boto3.client("s3").put_object(Bucket=bucket, Key=f"{name}/{key}", Body=b"")
    store = Store(f"{s3}/{name}")
    store.write_bytes("a.json", b"x")
    assert store.names() == ["a.json", "inner"]


def test_local_stores_are_absolute_and_lazy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("runs").child("demo-1", "budget-0.15")
    monkeypatch.chdir("/")
    assert store.local_path == tmp_path / "runs" / "demo-1" / "budget-0.15"
    assert store.uri == f"file://{store.local_path}"
    assert Store(store.uri) == store
    store.probe()
    assert list(tmp_path.iterdir()) == []


def test_a_local_write_is_all_or_nothing(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.write_bytes("a", b"old")

    def refuse(source, target):
        raise OSError("disk on fire")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="disk on fire"):
        store.write_bytes("a", b"new")
    assert store.read_bytes("a") == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    # What a killed process leaves is not listed.
    (tmp_path / ".a.0123.tmp").write_bytes(b"ne")
    assert store.names() == ["a"]


def test_storage_below_a_file_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write") as caught:
        Store(tmp_path / "file" / "runs").probe()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://", "gs://", "file://", "s3:/bucket/runs"])
def test_a_uri_without_a_bucket_is_no_folder_of_this_name(uri):
    """What `s3://$BUCKET` gives where the variable is empty."""
    with pytest.raises(StorageError, match=r"names no bucket or folder; expected a URI such as"):
        Store(uri)


def test_a_file_uri_may_have_one_slash(tmp_path):
    assert Store(f"file:{tmp_path}") == Store(tmp_path)


def test_what_names_no_folder_is_told():
    with pytest.raises(StorageError, match=r"the storage is None; expected a folder or a URI"):
        Store(None)


def test_a_back_end_that_cannot_start_is_told_in_one_line(monkeypatch):
    def start(uri, **options):
        raise OSError("Unable to load libjvm\nmore")

    monkeypatch.setattr("fsspec.url_to_fs", start)
    with pytest.raises(StorageError, match="cannot be used: Unable to load libjvm; expected"):
        Store("hdfs://bucket/runs")


def test_a_missing_bucket_or_server_is_told_in_one_line(s3, monkeypatch):
    with pytest.raises(StorageError, match="cannot write s3://no-such-bucket") as caught:
        Store("s3://no-such-bucket/runs").probe()
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="cannot write s3://artifacts") as caught:
        Store("s3://artifacts/runs").probe()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "package", "extra"),
    [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gcs"), ("az://b/x", "adlfs", "azure")],
)
def test_a_missing_back_end_names_the_extra(uri, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    loaded = sys.modules["fsspec.registry"]._registry
    monkeypatch.delitem(loaded, uri.partition(":")[0], raising=False)
    with pytest.raises(StorageError, match=rf"pip install stp_ray\[{extra}\]"):
        Store(uri)


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("", "empty"),
        ("nosuch://b/x", "nosuch"),
        ("s3://AKIAXYZ:secret@bucket/x", "without credentials"),
    ],
)
def test_bad_uris(uri, told):
    with pytest.raises(StorageError, match=told) as caught:
        Store(uri)
    assert "AKIAXYZ" not in str(caught.value)
