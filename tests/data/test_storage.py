import contextlib
import errno
import io
import itertools
import shutil
import socket
import threading
import uuid
import zipfile

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from stp_ray import backends
from stp_ray.data import describe, folder_to_parquet, load, parquet
from stp_ray.data.convert import is_saved_dataset
from stp_ray.data.parquet import ParquetSource
from stp_ray.data.storage import open_filesystem, patiently
from stp_ray.errors import DataError
from tests.data.samples import write_parquet
from tests.data.test_folders import folder_of_images
from tests.data.test_parquet import options


@pytest.fixture
def pauses(monkeypatch):
    """The seconds that were waited, without waiting."""
    waited, now = [], [0.0]

    class Clock:
        @staticmethod
        def monotonic():
            return now[0]

        @staticmethod
        def sleep(seconds):
            waited.append(seconds)
            now[0] += seconds

    monkeypatch.setattr(backends, "time", Clock)
    return waited


def stored(folder):
    """The same in a remote storage."""
    place = f"/{uuid.uuid4().hex}"
    fsspec.filesystem("memory").put(f"{folder}/", place, recursive=True)
    return f"memory:/{place}"


@pytest.fixture
def every_second_request_fails(monkeypatch):
    def failing(ask):
        turn = itertools.count()

        def asked(self, path, *more, **options):
            if next(turn) % 2 == 0:
                raise ConnectionResetError(f"away with {path}")
            return ask(self, path, *more, **options)

        return asked

    for name in ("ls", "find", "open", "cat_file"):
        monkeypatch.setattr(MemoryFileSystem, name, failing(getattr(MemoryFileSystem, name)))


@pytest.mark.parametrize("statistics", [True, False])
def test_nothing_that_is_looked_at_before_images_are_read_need_answer_at_once(
    tmp_path, pauses, request, statistics
):
    write_parquet(tmp_path, write_statistics=statistics)
    (tmp_path / "train").mkdir()
    (tmp_path / "train.parquet").rename(tmp_path / "train" / "a.parquet")
    uri = stored(tmp_path)
    request.getfixturevalue("every_second_request_fails")
    assert len(load(options(uri)).train) == 35
    assert len(pauses) > 5


def test_pauses_begin_anew_with_every_piece(tmp_path, pauses, monkeypatch):
    write_parquet(tmp_path, train=40, group=40)
    source = ParquetSource(stored(tmp_path))
    (part,) = source.parts("train", np.arange(40))
    read, told = parquet._encoded_rows, set()

    def breaks(filesystem, part, columns):
        for piece in read(filesystem, part, columns):
            if piece[0][0] not in told:
                told.add(piece[0][0])
                raise ConnectionResetError("away")
            yield piece

    monkeypatch.setattr(parquet, "CHUNK_ROWS", 4)
    monkeypatch.setattr(parquet, "_encoded_rows", breaks)
    assert np.concatenate([chunk.rows for chunk in source.read(part)]).tolist() == list(range(40))
    assert pauses == [backends.PAUSES[0]] * 10


def test_damage_is_looked_at_twice_and_not_waited_for(tmp_path, pauses):
    write_parquet(tmp_path)
    uri = stored(tmp_path)
    source = ParquetSource(uri)
    parts = source.parts("train", np.arange(40))
    filesystem, path = open_filesystem(f"{uri}/train.parquet")
    whole = filesystem.cat_file(path)
    filesystem.pipe_file(path, whole[:4] + bytes(200) + whole[204:])  # where images begin
    with pytest.raises(DataError, match="cannot be read"):
        list(source.read(parts[0]))
    assert len(pauses) == 1
    with pytest.raises(DataError, match="cannot be read"):
        source.layout()
    assert len(pauses) == 2


@pytest.mark.parametrize("lasts", [0, 70])
def test_what_a_cut_connection_made_look_damaged_is_read_again(
    tmp_path, pauses, monkeypatch, lasts
):
    write_parquet(tmp_path)
    uri, broken = stored(tmp_path), []
    read = MemoryFileSystem.open

    def cuts(self, path, *more, **options):
        handle = read(self, path, *more, **options)
        if path in broken:
            return handle
        broken.append(path)
        return io.BytesIO(handle.read()[:-lasts] if lasts else b"")

    monkeypatch.setattr(MemoryFileSystem, "open", cuts)
    assert describe(options(uri)).train_rows == 35
    assert len(pauses) == len(broken) == 2


def test_a_conversion_waits_for_what_it_reads(tmp_path, pauses, request):
    folder_of_images(tmp_path / "images", "train")
    folder_of_images(tmp_path / "images", "test", each=2)
    uri = stored(tmp_path / "images")
    request.getfixturevalue("every_second_request_fails")
    assert folder_to_parquet(uri, str(tmp_path / "set")) == {"train": 12, "test": 4}
    assert len(pauses) > 2
    assert load(options(tmp_path / "set")).corrupt == 0


@pytest.mark.parametrize("saved", [True, False])
def test_a_conversion_takes_nothing_for_missing_while_storage_is_away(
    tmp_path, pauses, monkeypatch, saved
):
    """As most back-ends do when they are asked whether something exists, or is a folder."""
    folder_of_images(tmp_path / "images", "train")
    folder_of_images(tmp_path / "images", "test", each=2)
    if saved:
        (tmp_path / "images" / "dataset_dict.json").touch()
    uri = stored(tmp_path / "images")
    turn, found = itertools.count(), MemoryFileSystem.info

    def info(self, path, **options):
        if next(turn) == 0:
            raise ConnectionResetError("away")
        return found(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "info", info)
    for name in ("exists", "isdir"):
        monkeypatch.setattr(MemoryFileSystem, name, getattr(AbstractFileSystem, name))
    assert is_saved_dataset(uri) == saved
    assert len(pauses) == 1
    if not saved:
        turn = itertools.count()
        assert folder_to_parquet(uri, str(tmp_path / "set")) == {"train": 12, "test": 4}


@pytest.mark.parametrize("place", ["nothing", "images/train/cat/0.png", "images/train/cat/0.png/x"])
def test_what_is_no_folder_is_not_converted(tmp_path, pauses, place):
    folder_of_images(tmp_path / "images", "train")
    for uri in (stored(tmp_path), str(tmp_path)):
        assert not is_saved_dataset(f"{uri}/{place}")
        with pytest.raises(DataError, match="is not a folder; expected train and test"):
            folder_to_parquet(f"{uri}/{place}", str(tmp_path / "set"))
    assert not pauses


def test_an_archive_is_waited_for_where_it_is_opened(tmp_path, pauses, request):
    write_parquet(tmp_path / "set")
    shutil.make_archive(str(tmp_path / "packed" / "set"), "zip", tmp_path / "set")
    uri = stored(tmp_path / "packed")
    request.getfixturevalue("every_second_request_fails")
    assert describe(options(f"zip://::{uri}/set.zip")).train_rows == 35
    assert pauses


def s3_error(code):
    translate = pytest.importorskip("s3fs.errors").translate_boto_error
    refused = pytest.importorskip("botocore.exceptions").ClientError
    return translate(refused({"Error": {"Code": code, "Message": code}}, "ListObjectsV2"))


@pytest.mark.parametrize(
    "code", ["NoSuchBucket", "InvalidAccessKeyId", "ExpiredToken", "InvalidToken", "AccessDenied"]
)
def test_what_is_missing_or_forbidden_is_not_waited_for(monkeypatch, pauses, code):
    def refuses(*_, **__):
        raise s3_error(code)

    monkeypatch.setattr(MemoryFileSystem, "ls", refuses)
    with pytest.raises(DataError, match=r"does not exist|cannot be read"):
        load(options("memory://nothing"))
    assert not pauses


def test_a_profile_that_is_not_there_is_not_waited_for():
    absent = pytest.importorskip("botocore.exceptions").ProfileNotFound
    assert not backends.may_pass(absent(profile="typo"))


def test_storage_that_stays_away_is_asked_for_a_minute(pauses):
    def away():
        raise OSError(errno.EIO, "away")

    filesystem, _ = open_filesystem("memory://")
    with pytest.raises(OSError, match="away"):
        patiently(filesystem, "x", away)
    assert pauses == list(backends.PAUSES)


def test_only_errors_of_storage_are_waited_for(pauses):
    def wrong():
        raise ValueError("a mistake of ours")

    with pytest.raises(ValueError, match="of ours"):
        patiently(open_filesystem("memory://")[0], "x", wrong)
    assert not pauses


def test_many_files_that_stay_away_are_waited_for_once(tmp_path, monkeypatch):
    write_parquet(tmp_path)
    (tmp_path / "train").mkdir()
    for number in range(64):
        shutil.copy(tmp_path / "train.parquet", tmp_path / "train" / f"{number}.parquet")
    (tmp_path / "train.parquet").unlink()
    uri, tried = stored(tmp_path), set()

    def away(self, path, *more, **options):
        tried.add(path)
        raise ConnectionResetError("away")

    monkeypatch.setattr(MemoryFileSystem, "open", away)
    monkeypatch.setattr(backends, "PAUSES", (0.3,))
    with pytest.raises(DataError, match="away"):
        describe(options(uri))
    assert len(tried) <= 16


def test_a_local_disk_is_not_waited_for(tmp_path, pauses, monkeypatch):
    write_parquet(tmp_path / "set")
    shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "set")

    def away():
        raise OSError(errno.EIO, "away")

    for uri in (str(tmp_path), f"file://{tmp_path}", f"zip://::{tmp_path / 'set.zip'}"):
        with pytest.raises(OSError, match="away"):
            patiently(open_filesystem(uri)[0], "x", away)
    assert not pauses


@pytest.fixture
def silent(s3, monkeypatch):
    """Connections that an S3 server accepted and does not answer."""
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()  # those of another test know its server
    taken = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept():
            with contextlib.suppress(OSError):  # the server is closed
                while True:
                    taken.append(server.accept()[0])

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.getsockname()))
        yield taken
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
    for connection in taken:
        connection.close()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("uri", ["s3://silent/set", "s3a://silent/set"])
def test_s3_that_says_nothing_is_asked_as_often_as_it_is_waited_for(monkeypatch, silent, uri):
    """Tries within tries took a quarter of an hour."""
    monkeypatch.setattr(backends, "PAUSES", (0.1, 0.1))
    impatient = backends.s3_client() | {"read_timeout": 0.5}
    monkeypatch.setattr(backends, "s3_client", lambda: dict(impatient))
    with pytest.raises(DataError, match="Read timeout"):
        describe(options(uri))
    assert len(silent) == 3


def test_what_is_written_keeps_the_tries_of_its_back_end(s3):
    for _ in range(2):
        written, read = (open_filesystem(f"{s3}/set", written=w)[0] for w in (True, False))
        assert (written.retries, read.retries) == (5, 1)
        assert written.exists(s3) and read.exists(s3)
    assert open_filesystem(f"{s3}/set")[0] is read
    with fsspec.open(f"{s3}/set.zip", "wb") as file, zipfile.ZipFile(file, "w") as packed:
        packed.writestr("name", bytes(100))
    assert open_filesystem(f"zip://::{s3}/set.zip")[0].fo.fs is read
