import os
import threading
import time
from itertools import chain, pairwise
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st

import stp_ray.stages.ingest as ingest
from stp_ray.data import DataOptions, describe, eval_batches, load, load_split
from stp_ray.data.decode import decode
from stp_ray.data.parquet import ParquetPart
from stp_ray.errors import DataError
from stp_ray.stages.ingest import stream, stream_batches, stream_eval_batches
from tests.data.samples import encode, pixels, real_data, table, write_parquet

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def cluster(s3):  # its address is in the environment, as it is on a cluster's nodes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20)
        yield
        ray.shutdown()


def options(folder, **changes):
    defaults = {"name": "parquet", "uri": str(folder), "holdout": 5, "loading": "stream"}
    return DataOptions(**{**defaults, **changes})


def rows(dataset):
    batches = list(dataset.iter_batches(batch_size=None, batch_format="numpy"))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def epoch_of(options, *, rank=0, world_size=1, epoch=0, seed=1, batch_size=8, **more):
    shard = stream(options, "train", seed=seed, epoch=epoch, rank=rank, world_size=world_size)
    where = {"seed": seed, "epoch": epoch, "rank": rank, "world_size": world_size, **more}
    return list(stream_batches(shard, options, batch_size=batch_size, num_classes=4, **where))


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        for a, b in zip(first, second, strict=True)
    )


def contents(pairs):
    return sorted(image.numpy().tobytes() for images, _ in pairs for image in images)


def normalised(split, options):
    return contents(eval_batches(split, options, 100))


@pytest.mark.parametrize("split", ["train", "holdout", "test"])
@pytest.mark.parametrize("where", ["trainer", "tasks"])
def test_a_stream_holds_what_memory_would(cluster, tmp_path, split, where):
    write_parquet(tmp_path)
    streamed = rows(stream(options(tmp_path, decode=where), split))
    resident = getattr(load(options(tmp_path)), split)
    images = streamed["image"]
    if where == "trainer":
        images, readable = decode(images.tolist(), 8, resize=False)
        assert readable.all()
    assert images.dtype == np.uint8
    assert streamed["label"].dtype == np.int64
    np.testing.assert_array_equal(images, resident.images)
    np.testing.assert_array_equal(streamed["label"], resident.labels)


def test_an_epoch_is_the_same_wherever_its_images_are_decoded(cluster, tmp_path):
    write_parquet(tmp_path, train=53, corrupt=(7, 30))
    augmented = {"crop_padding": 1, "flip": True, "max_corrupt": 0.1}
    one, other = (
        epoch_of(options(tmp_path, decode=where, **augmented), threads=threads)
        for where, threads in (("trainer", 3), ("tasks", 1))
    )
    assert len(one) == 6
    assert same(one, other)


def test_an_epoch_is_the_same_when_it_begins_again(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "_UNIT_ROWS", 10)
    monkeypatch.setattr(ingest, "_BUFFER_BYTES", 0)
    write_parquet(tmp_path, train=85)
    augmented = options(tmp_path, crop_padding=1, flip=True)
    first = [epoch_of(augmented, rank=rank, world_size=2) for rank in range(2)]
    again = [epoch_of(augmented, rank=rank, world_size=2) for rank in range(2)]
    other = epoch_of(augmented, rank=0, world_size=2, epoch=1)
    assert [len(batches) for batches in first] == [10, 10]
    assert all(images.shape == (4, 3, 8, 8) for images, _ in first[0])
    assert same(first[0], again[0]) and same(first[1], again[1])
    assert not same(first[0], other)


def test_ranks_share_all_training_images(cluster, tmp_path):
    write_parquet(tmp_path, train=53)
    plain = options(tmp_path)
    seen = [contents(epoch_of(plain, rank=rank, world_size=2)) for rank in range(2)]
    everything = normalised(load(plain).train, plain)
    assert len(everything) == 48
    assert sorted(seen[0] + seen[1]) == everything


def test_images_keep_their_labels_and_are_mixed(cluster, tmp_path):
    write_parquet(tmp_path, train=53)
    plain = options(tmp_path)
    (images, labels), *_ = epoch_of(plain, batch_size=48)
    split = load(plain).train
    ((stored, stored_labels),) = eval_batches(split, plain, 48)
    order = [next(i for i in range(48) if torch.equal(stored[i], image)) for image in images]
    assert torch.equal(stored_labels[order], labels)
    assert order != sorted(order)


def test_evaluation_streams_in_order(cluster, tmp_path):
    write_parquet(tmp_path, test=21)
    plain = options(tmp_path)
    streamed = list(stream_eval_batches(stream(plain, "test"), plain, batch_size=8, rows=21))
    assert same(streamed, list(eval_batches(load_split(plain, "test"), plain, 8)))


def test_reading_ahead_leaves_the_interpreter_to_the_trainer(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "_UNIT_BYTES", 1)
    write_parquet(tmp_path)
    random = np.random.default_rng(0)
    files = [encode(pixels(1)[0]), *(random.bytes(2**20) for _ in range(159))]
    pq.write_table(table(files, [0, 1, 2, 3] * 40), tmp_path / "train.parquet", row_group_size=4)
    arriving = iter(stream(options(tmp_path), "train").iter_batches(batch_size=None))
    next(arriving)
    idle = 0
    while idle < 10:  # half of the object store is full of what was read ahead
        time.sleep(0.2)
        idle = idle + 1 if ray.available_resources().get("CPU") == 2 else 0
    spent = time.process_time()
    for _ in range(10):
        time.sleep(0.2)
        next(arriving)
    spent = time.process_time() - spent
    assert any(thread.name.startswith("StreamingExecutor") for thread in threading.enumerate())
    assert spent < 1.0  # of two seconds; the thread that waits for room would take all
    assert sum(1 for _ in arriving) == 29


@pytest.mark.parametrize(("spent", "pause"), [(0.001, 0.02), (0.01, 0.06), (0.5, 0.1)])
def test_a_slow_processor_gets_longer_pauses(monkeypatch, spent, pause):
    looked, slept = iter((spent, spent, spent + 0.003, spent + 0.003)), []
    clock = SimpleNamespace(thread_time=lambda: next(looked), sleep=slept.append)
    monkeypatch.setattr(ingest, "time", clock)  # here alone: Ray's threads sleep as well
    waiting = ingest._Pause()
    waiting.on_execution_step(None)
    waiting.on_execution_step(None)
    assert slept == pytest.approx([pause, 0.02])


def test_skipped_images_are_counted_and_made_up_for(cluster, tmp_path, caplog):
    write_parquet(tmp_path, train=45, corrupt=(3, 4, 20, 44))
    lenient = options(tmp_path, max_corrupt=0.2)
    known = normalised(load(lenient).train, lenient)
    caplog.clear()
    batches = epoch_of(lenient)
    assert len(batches) == 5
    found = f"{40 - len(known)} of 40 images of the training split cannot be decoded"
    assert caplog.text.count(found) == 1
    assert len(known) < 40
    assert set(contents(batches)) == set(known)


def test_too_many_unreadable_images_stop_the_epoch(cluster, tmp_path):
    write_parquet(tmp_path, train=45, corrupt=tuple(range(10, 16)))
    strict = options(tmp_path, max_corrupt=0.05)
    with pytest.raises(DataError, match=r"\d of 40 images of the training split cannot be dec"):
        epoch_of(strict)


def test_a_file_without_one_readable_image(cluster, tmp_path):
    write_parquet(tmp_path, train=45)
    (tmp_path / "train").mkdir()
    (tmp_path / "train.parquet").rename(tmp_path / "train" / "0.parquet")
    import pyarrow.parquet as pq

    pq.write_table(table([b"text"] * 10, [0] * 10), tmp_path / "train" / "1.parquet")
    for where in ("trainer", "tasks"):
        with pytest.raises(DataError, match=r"\d+ of 50 images of the training split cannot be"):
            epoch_of(options(tmp_path, max_corrupt=0.1, decode=where))
        assert len(epoch_of(options(tmp_path, max_corrupt=0.5, decode=where))) == 6


def test_nothing_that_can_be_decoded_is_a_mistake_whatever_is_tolerated(tmp_path):
    write_parquet(tmp_path, train=10, corrupt=tuple(range(1, 10)))
    lenient = options(tmp_path, holdout=1, max_corrupt=1.0)
    files = np.array([b"text"] * 9, dtype=object), np.zeros(9, dtype=np.int64)
    decoding = ingest._Decoding(lenient, describe(lenient), "training", 9, 2)
    mixed = ingest._mixed(iter([files]), 4, 0, np.random.default_rng(0))
    with pytest.raises(DataError, match="none of 9 images of the training split can be decoded"):
        list(decoding.run(ingest._rebatched(mixed, 4), wanted=8))


def test_unreadable_images_may_all_lie_in_one_workers_part(tmp_path):
    write_parquet(tmp_path, train=100)
    lenient = options(tmp_path, max_corrupt=0.05)  # 4 of the 95 that are trained on
    for bad, count in ((4, 6), (5, 0)):
        contents = [b"text"] * bad + [encode(image) for image in pixels(10 - bad)]
        files = np.array(contents, dtype=object), np.zeros(10, dtype=np.int64)
        decoding = ingest._Decoding(lenient, describe(lenient), "training", 10, 1)
        decoded = decoding.run(iter([files]))
        if count:
            assert sum(len(labels) for _, labels in decoded) == count
        else:
            with pytest.raises(DataError, match="5 of 10 images of the training split cannot"):
                list(decoded)


def test_no_more_is_decoded_than_is_wanted(tmp_path, monkeypatch):
    write_parquet(tmp_path, train=40)
    plain = options(tmp_path)
    files = (np.array([encode(image)], dtype=object) for image in pixels(40))
    pairs = ((image, np.zeros(1, dtype=np.int64)) for image in files)
    seen = []
    monkeypatch.setattr(
        ingest, "decode", lambda files, *a, **k: seen.append(len(files)) or decode(files, *a, **k)
    )
    decoding = ingest._Decoding(plain, describe(plain), "training", 40, 3)
    made = list(decoding.run(ingest._rebatched(pairs, 4), wanted=12))
    assert [len(labels) for _, labels in made] == [4, 4, 4]
    assert seen == [4, 4, 4]


@pytest.mark.parametrize("where", ["trainer", "tasks"])
def test_a_mistake_found_on_the_way_is_one_line(cluster, tmp_path, where):
    write_parquet(tmp_path)
    import pyarrow.parquet as pq

    files = [encode(image) for image in pixels(30)] + [encode(pixels(1, 9)[0])] * 10
    pq.write_table(
        table(files, [0] * 40, [f"class {i}" for i in range(4)]), tmp_path / "train.parquet"
    )
    with pytest.raises(DataError, match=r"^images differ in size .*set data\.image_size"):
        epoch_of(options(tmp_path, decode=where))


def test_more_ranks_than_row_groups(cluster, tmp_path):
    write_parquet(tmp_path, train=13, group=20)
    plain = options(tmp_path)
    seen = [contents(epoch_of(plain, rank=rank, world_size=4, batch_size=4)) for rank in range(4)]
    assert [len(part) for part in seen] == [2, 2, 2, 2]
    assert sorted(chain(*seen)) == normalised(load(plain).train, plain)


def test_s3_through_the_endpoint_of_the_environment(cluster, tmp_path):
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    write_parquet(tmp_path)
    client = boto3.client("s3")
    client.create_bucket(Bucket="images")
    for split in ("train", "test"):
        client.upload_file(str(tmp_path / f"{split}.parquet"), "images", f"set/{split}.parquet")
    remote = options("s3://images/set")
    assert same(epoch_of(remote), epoch_of(options(tmp_path)))


def test_real_images_stream(cluster):
    real = options(real_data("cifar10"), holdout=16, limit=400, max_corrupt=0)
    summary = describe(real)
    batches = epoch_of(real, batch_size=64, summary=summary)
    assert len(batches) == 6
    assert set(contents(batches)) <= set(normalised(load(real).train, real))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "digits", "loading": "auto"}, "data.name is digits; expected parquet"),
        ({"uri": "missing"}, "missing does not exist"),
        ({"holdout": 400}, "holdout is 400 of 40"),
    ],
)
def test_a_mistake_is_found_before_anything_is_read(tmp_path, changes, message):
    write_parquet(tmp_path)
    with pytest.raises(DataError, match=message):
        stream(options(tmp_path, **changes), "train")


def test_a_batch_that_cannot_be_filled_or_divided_is_refused(tmp_path):
    write_parquet(tmp_path)
    where = {"seed": 0, "epoch": 0, "num_classes": 4}
    with pytest.raises(DataError, match="35 training images do not fill one batch of 64"):
        stream_batches(None, options(tmp_path), batch_size=64, **where)
    with pytest.raises(DataError, match="expected a multiple of 3"):
        stream_batches(None, options(tmp_path), batch_size=8, world_size=3, **where)


@given(st.lists(st.integers(1, 40), max_size=8), st.integers(1, 6))
def test_shares_are_even_and_disjoint(sizes, world_size):
    edges = np.cumsum([0, *sizes])
    units = [[ParquetPart("f", 0, int(a), np.arange(a, b), 1)] for a, b in pairwise(edges)]
    shares = [
        [
            row
            for unit in ingest._share(units, rank, world_size)
            for part in unit
            for row in part.rows
        ]
        for rank in range(world_size)
    ]
    assert list(chain(*shares)) == list(range(edges[-1]))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_units_join_small_row_groups_of_one_file():
    def part(path, count, size):
        return ParquetPart(path, 0, 0, np.arange(count), size)

    parts = [part("a", 600, 1), part("a", 400, 1), part("a", 100, 1), part("b", 1, 1)]
    parts += [part("b", 1, 2**30), part("b", 1, 1)]
    assert [len(unit) for unit in ingest._units(parts)] == [2, 1, 1, 1, 1]


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.integers(1, 30),
    st.integers(0, 9),
)
def test_the_buffer_gives_every_image_once_before_it_repeats(sizes, capacity, seed):
    edges = np.cumsum([0, *sizes])
    pairs = [(np.arange(a, b, dtype=np.uint8), np.arange(a, b)) for a, b in pairwise(edges)]
    mixed = ingest._mixed(iter(pairs), 1, capacity, np.random.default_rng(seed))
    total, out = int(edges[-1]), []
    for images, labels in ingest._rebatched(mixed, 4):
        assert len(labels) == 4
        assert (images == labels).all()
        out += labels.tolist()
        if len(out) >= total + 8:
            break
    assert sorted(out[:total]) == list(range(total))


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 7))
def test_blocks_become_batches_of_one_size_but_the_last(sizes, size):
    edges = np.cumsum([0, *sizes])
    blocks = [(np.arange(a, b, dtype=np.uint8), np.arange(a, b)) for a, b in pairwise(edges)]
    for images, _ in blocks:
        images.flags.writeable = False
    found = list(ingest._rebatched(iter(blocks), size))
    assert [int(row) for _, labels in found for row in labels] == list(range(int(edges[-1])))
    assert all(len(labels) == size for _, labels in found[:-1])
    for images, labels in found:
        assert (images == labels).all() and len(labels)
        # Not views of the blocks: those are Ray's, and cannot be written.
        assert images.flags.writeable


def test_an_empty_share_is_a_mistake():
    with pytest.raises(DataError, match="share of the training images is empty"):
        next(ingest._mixed(iter([]), 4, 4, np.random.default_rng(0)))


def test_the_buffer_counts_the_bytes_of_files():
    files = [np.array([b"x" * 10, None], dtype=object) for _ in range(9)]
    mixed = ingest._mixed(
        ((each, np.zeros(2, dtype=np.int64)) for each in files), 1, 30, np.random.default_rng(0)
    )
    # Three portions fill it; what comes in then is what leaves.
    assert [len(labels) for _, labels in zip(range(7), (p[1] for p in mixed), strict=False)] == [
        *[2] * 6, 6,
    ]  # fmt: skip


def test_ray_is_not_needed_to_read_parquet():
    import subprocess
    import sys

    code = (
        "import sys, stp_ray.data; "
        "print([name for name in ('ray', 'pydantic', 'wandb') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ
    )
    assert done.stdout.strip() == "[]", done.stderr
