"""Object storage that answers with errors, cuts answers short, or is away for a while."""

import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import torch

from stp_ray import backends
from stp_ray.artifacts import Checkpoints, Manifest, Store
from stp_ray.artifacts import store as store_module
from stp_ray.data import parquet
from stp_ray.data.parquet import ParquetSource
from stp_ray.errors import DataError, StorageError
from tests.data.samples import write_parquet
from tests.unreliable import Unreliable

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def server(s3, monkeypatch):
    with Unreliable(os.environ["AWS_ENDPOINT_URL"]).serving() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def test_one_request_in_five_may_fail(s3, server):
    store = Store(f"{s3}/{uuid.uuid4().hex}")
    store.probe()
    server.share = 0.2
    checkpoints = Checkpoints(store, keep=2)
    for step in range(1, 6):
        weights = {"w": torch.full((200, 100), float(step))}
        checkpoints.save(step, weights, {"step": step})
        assert store.create_bytes(f"lease-{step}.json", f"owner {step}".encode())
        assert not store.create_bytes(f"lease-{step}.json", b"somebody else")
        Manifest(store).finish(
            f"stage-{step}", inputs={}, outputs={}, seconds=1, device_seconds=1, metrics={}
        )
    step, tensors, meta = checkpoints.latest()
    assert (step, meta) == (5, {"step": 5})
    assert torch.equal(tensors["w"], torch.full((200, 100), 5.0))
    assert list(Manifest(store).stages()) == [f"stage-{step}" for step in range(1, 6)]
    assert server.spoiled > 10


def test_storage_that_is_away_for_ten_seconds_is_waited_for(s3, server):
    store = Store(f"{s3}/{uuid.uuid4().hex}")
    store.write_bytes("a.bin", b"before")
    server.away = True
    timer = threading.Timer(10.0, setattr, (server, "away", False))
    timer.start()
    started = time.monotonic()
    store.write_bytes("a.bin", b"after")
    assert time.monotonic() - started > 9
    assert store.read_bytes("a.bin") == b"after"
    timer.join()


def test_data_that_is_away_for_ten_seconds_is_waited_for(s3, server, tmp_path):
    """By every one of many readers, and from the row on that it had come to."""
    write_parquet(tmp_path / "set", train=64 * 7)
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()  # which know the server itself
    uri = f"{s3}/{uuid.uuid4().hex}"
    s3fs.S3FileSystem().put(f"{tmp_path / 'set'}/", uri, recursive=True)
    source = ParquetSource(uri)
    parts = source.parts("train", np.arange(64 * 7))
    server.away = True
    timer = threading.Timer(10.0, setattr, (server, "away", False))
    timer.start()
    started = time.monotonic()
    with ThreadPoolExecutor(len(parts)) as pool:
        found = list(pool.map(lambda part: list(source.read(part)), parts))
    assert time.monotonic() - started > 9
    rows = np.concatenate([chunk.rows for chunks in found for chunk in chunks])
    assert rows.tolist() == list(range(64 * 7))
    timer.join()


def test_a_part_whose_middle_cannot_be_read_goes_on_there(tmp_path, monkeypatch):
    write_parquet(tmp_path / "set", train=40, group=40)
    filesystem = fsspec.filesystem("memory")
    place = f"/{uuid.uuid4().hex}"
    filesystem.put(f"{tmp_path / 'set'}/", place, recursive=True)
    source = ParquetSource(f"memory:/{place}")
    (part,) = source.parts("train", np.arange(3, 39))
    read, failed = parquet._encoded_rows, []

    def breaks(*arguments):
        for place, found in enumerate(read(*arguments)):
            if place == 2 and len(failed) < 2:
                failed.append(found)
                raise ConnectionResetError("away")
            yield found

    monkeypatch.setattr(parquet, "CHUNK_ROWS", 5)
    monkeypatch.setattr(parquet, "_encoded_rows", breaks)
    monkeypatch.setattr(backends, "PAUSES", (0.0, 0.0))
    rows = np.concatenate([chunk.rows for chunk in source.read(part)])
    assert rows.tolist() == list(range(3, 39)) and len(failed) == 2


def test_data_that_stays_away_is_told(tmp_path, monkeypatch):
    write_parquet(tmp_path / "set")
    filesystem = fsspec.filesystem("memory")
    place = f"/{uuid.uuid4().hex}"
    filesystem.put(f"{tmp_path / 'set'}/", place, recursive=True)
    source, tries = ParquetSource(f"memory:/{place}"), []

    def away(*arguments, **options):
        tries.append(1)
        raise ConnectionResetError("away")

    monkeypatch.setattr(source._filesystem, "open", away)
    monkeypatch.setattr(backends, "PAUSES", (0.0, 0.0))
    with pytest.raises(DataError, match=r"cannot be read \(away\)"):
        list(source.read(source.parts("train", np.arange(5))[0]))
    assert len(tries) == 3


def test_storage_that_stays_away_ends_in_one_line(s3, server, monkeypatch):
    monkeypatch.setattr(backends, "PAUSES", (0.1, 0.1))
    store = Store(f"{s3}/{uuid.uuid4().hex}")
    server.away = True
    with pytest.raises(StorageError, match="cannot write s3://") as told:
        store.write_bytes("a.bin", b"x")
    assert "\n" not in str(told.value)


def test_a_file_that_nobody_takes_is_sent_again_and_in_the_end_told(s3, server, monkeypatch):
    """S3's clients ask first whether a file is wanted, and would wait for ever."""
    monkeypatch.setattr("stp_ray.artifacts.store.STALLED", 1.0)
    monkeypatch.setattr(backends, "PAUSES", (0.1,) * 5)
    store = Store(f"{s3}/{uuid.uuid4().hex}")
    with server.saying_nothing(2.0):
        store.write_bytes("a.bin", b"in the end")
    assert store.read_bytes("a.bin") == b"in the end"

    monkeypatch.setattr(backends, "PATIENCE", 0.5)
    monkeypatch.setattr("stp_ray.artifacts.store.STALLED", 0.4)
    with server.saying_nothing(1.0):  # a try alone outlasts the patience
        store.write_bytes("large.bin", bytes(store_module.SLOWEST))
    assert len(store.read_bytes("large.bin")) == store_module.SLOWEST

    started = time.monotonic()
    with server.saying_nothing(60.0):
        with pytest.raises(StorageError, match=r"cannot write s3://.*: no answer in time"):
            store.write_bytes("a.bin", b"never")
        with pytest.raises(StorageError, match=r"cannot write s3://.*: no answer in time"):
            store.probe()
    assert time.monotonic() - started < 10


def test_storage_that_refuses_is_tried_for_a_minute(monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds)
    )
    monkeypatch.setattr(backends, "time", clock)
    store = Store(f"memory://{uuid.uuid4().hex}")

    def refuse(*_, **__):
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(store._fs, "pipe_file", refuse)
    with pytest.raises(StorageError, match="refused"):
        store.write_bytes("a.bin", b"x")
    assert 55 < now[0] <= backends.PATIENCE
