import json
import os
import shutil
import subprocess
import sys
import time

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stp_ray.data import DataOptions, describe, load, load_split, parquet
from stp_ray.data.load import selection
from stp_ray.data.parquet import ROWS, ParquetSource
from stp_ray.data.split import spread_rows
from stp_ray.errors import DataError, StorageError
from tests.data.samples import encode, pixels, real_data, table, write_parquet


def options(folder, **changes):
    return DataOptions(**{"name": "parquet", "uri": str(folder), "holdout": 5, **changes})


def test_a_folder_with_two_files(tmp_path):
    images, labels = write_parquet(tmp_path)
    summary = describe(options(tmp_path))
    assert summary.class_names == [f"class {index}" for index in range(4)]
    assert (summary.train_rows, summary.holdout_rows, summary.test_rows) == (35, 5, 12)
    assert summary.image_size == summary.held_size == 8
    assert summary.bytes == 52 * 3 * 64
    assert not summary.streams

    data = load(options(tmp_path))
    assert data.num_classes == 4
    assert data.corrupt == 0
    assert data.train.images.dtype == np.uint8
    assert data.train.labels.dtype == np.int64
    both = np.concatenate([data.train.images, data.holdout.images])
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in images)
    # Every image still has its own label.
    label_of = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for split in (data.train, data.holdout):
        for image, label in zip(split.images, split.labels, strict=True):
            assert label_of[image.tobytes()] == label


def test_part_files_are_read_in_the_order_of_their_names(tmp_path):
    write_parquet(tmp_path / "flat", train=40)
    whole = pq.read_table(tmp_path / "flat" / "train.parquet")
    parted = tmp_path / "parted"
    (parted / "train-parts").mkdir(parents=True)
    (parted / "val" / "deep").mkdir(parents=True)
    for index, start in enumerate(range(0, 40, 15)):
        pq.write_table(whole.slice(start, 15), parted / "train-parts" / f"{index:03}.parquet")
    (parted / "train-parts" / "_SUCCESS").touch()
    (parted / "train-parts" / "_metadata.parquet").touch()
    for left in ("_temporary/0", ".ipynb_checkpoints"):  # by a write that was killed, by an editor
        (parted / "train-parts" / left).mkdir(parents=True)
        pq.write_table(whole, parted / "train-parts" / left / "000.parquet")
    test = pq.read_table(tmp_path / "flat" / "test.parquet")
    pq.write_table(test, parted / "val" / "deep" / "0.parquet")
    flat, split = load(options(tmp_path / "flat")), load(options(parted))
    for name in ("train", "holdout", "test"):
        np.testing.assert_array_equal(getattr(flat, name).images, getattr(split, name).images)
        np.testing.assert_array_equal(getattr(flat, name).labels, getattr(split, name).labels)


def test_the_files_of_a_hugging_face_repository(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    for split in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        made = table([encode(image) for image in pixels(6)], [0, 1, 0, 1, 0, 1])
        made = made.rename_columns(["img", "label"])
        made = made.replace_schema_metadata({"huggingface": json.dumps(names)})
        pq.write_table(made, folder / f"{split}.parquet")
    summary = describe(options(tmp_path))
    assert summary.class_names == ["cat", "dog"]
    assert (summary.train_rows, summary.test_rows) == (7, 6)
    assert len(load(options(tmp_path)).train) == 7


@pytest.mark.parametrize("other", ["trainval-00000-of-00001", "train_eval-00000-of-00001"])
def test_a_split_is_not_taken_for_another_that_begins_like_it(tmp_path, other):
    write_parquet(tmp_path, train=20, test=12)
    (tmp_path / "train.parquet").rename(tmp_path / "train-00000-of-00001.parquet")
    (tmp_path / "test.parquet").rename(tmp_path / "test-00000-of-00001.parquet")
    shutil.copy(tmp_path / "test-00000-of-00001.parquet", tmp_path / f"{other}.parquet")
    found = describe(options(tmp_path))
    assert (found.train_rows + found.holdout_rows, found.test_rows) == (20, 12)


def test_plain_binary_images_and_no_class_names(tmp_path):
    for split in ("train", "test"):
        made = pa.table(
            {
                "label": pa.array([0, 1, 2, 1, 0, 1, 2, 0], pa.uint8()),
                "image": [encode(image) for image in pixels(8)],
                "other": ["x"] * 8,
            }
        )
        pq.write_table(made, tmp_path / f"{split}.parquet", write_statistics=False)
    data = load(options(tmp_path))
    assert data.class_names == ["0", "1", "2"]
    assert data.test.labels.tolist() == [0, 1, 2, 1, 0, 1, 2, 0]


def test_an_image_without_bytes_counts_as_corrupt(tmp_path):
    write_parquet(tmp_path)
    made = table([encode(pixels(1)[0]), None], [0, 1], [f"class {i}" for i in range(4)])
    pq.write_table(made, tmp_path / "test.parquet")
    assert len(load(options(tmp_path, max_corrupt=0.5)).test) == 1


def test_only_the_first_rows_with_a_limit(tmp_path):
    images, _ = write_parquet(tmp_path)
    data = load(options(tmp_path, limit=11))
    assert (len(data.train), len(data.holdout), len(data.test)) == (6, 5, 12)
    used = {image.tobytes() for image in images[:11]}
    assert all(image.tobytes() in used for image in data.train.images)


def test_one_split_or_a_sample_of_it(tmp_path):
    write_parquet(tmp_path)
    data = load(options(tmp_path))
    for name in ("train", "holdout", "test"):
        alone = load_split(options(tmp_path), name)
        np.testing.assert_array_equal(alone.images, getattr(data, name).images)
        np.testing.assert_array_equal(alone.labels, getattr(data, name).labels)
        few, sample = load_split(options(tmp_path), name, 4), getattr(data, name).sample(4)
        np.testing.assert_array_equal(few.images, sample.images)
        np.testing.assert_array_equal(few.labels, sample.labels)
    assert len(load_split(options(tmp_path), "train", 36)) == 35


def test_images_of_many_shapes_are_brought_to_one(tmp_path):
    write_parquet(tmp_path)
    mixed = [encode(pixels(1, size)[0][:, :, : size - 2]) for size in (10, 20, 31)]
    pq.write_table(table(mixed, [0, 1, 2]), tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"images differ in size .*set data\.image_size"):
        load(options(tmp_path))
    data = load(options(tmp_path, image_size=16))
    assert data.test.images.shape == (3, 3, 16, 16)
    assert describe(options(tmp_path, image_size=16)).bytes == 43 * 3 * 256
    held = describe(options(tmp_path, image_size=14, random_resized_crop=True))
    assert (held.image_size, held.held_size) == (14, 16)


@pytest.mark.parametrize("threshold", [0.04, 0.06])
def test_corrupt_images_are_counted_up_to_the_share(tmp_path, caplog, threshold):
    images, _ = write_parquet(tmp_path, corrupt=(0, 17))
    if threshold == 0.04:
        with pytest.raises(DataError, match=r"^2 of 40 images .*\(5\.00%\); expected at most 4"):
            load(options(tmp_path, max_corrupt=threshold))
        return
    data = load(options(tmp_path, max_corrupt=threshold))
    assert data.corrupt == 2
    assert len(data.train) + len(data.holdout) == 38
    assert "2 of 40 images of the training split" in caplog.text
    kept = {image.tobytes() for split in (data.train, data.holdout) for image in split.images}
    assert kept == {image.tobytes() for row, image in enumerate(images) if row not in (0, 17)}


def test_streaming_is_chosen_by_size(tmp_path):
    write_parquet(tmp_path, size=200)
    assert describe(options(tmp_path, resident_limit_mb=5)).streams
    assert not describe(options(tmp_path, resident_limit_mb=6)).streams
    assert describe(options(tmp_path, loading="stream")).streams
    assert not describe(options(tmp_path, resident_limit_mb=5, loading="resident")).streams


def write(folder, split, made):
    pq.write_table(made, folder / f"{split}.parquet")


def small(labels=(0, 1, 0, 1), names=("a", "b")):
    return table([encode(image) for image in pixels(len(labels))], list(labels), list(names))


def no_test_split(folder):
    (folder / "test.parquet").unlink()


def empty_folder(folder):
    no_test_split(folder)
    (folder / "test").mkdir()


def empty_split(folder):
    write(folder, "test", small().slice(0, 0))


def no_label(folder):
    write(folder, "test", small().drop_columns("label"))


def no_image(folder):
    write(folder, "train", small().rename_columns(["photo", "label"]))


def text_labels(folder):
    write(folder, "train", small().set_column(1, "label", pa.array(["a", "b", "a", "b"])))


def label_too_large(folder):
    write(folder, "test", small((0, 1, 2, 1)))


def label_missing(folder):
    write(folder, "train", small((0, None, 1, 1)))


def negative_label(folder):
    write(folder, "test", small((0, 1, -1, 1)))


def broken_names(folder):
    made = small().replace_schema_metadata({"class_names": "[1,"})
    write(folder, "train", made)


def names_that_are_no_list(folder):
    write(folder, "train", small().replace_schema_metadata({"class_names": "3"}))


def other_names(folder):
    write(folder, "test", small(names=("b", "a")))


def one_class(folder):
    for split in ("train", "test"):
        write(folder, split, small((0, 0, 0, 0), names=("a",)))


def labels_that_are_ids(folder):
    for split in ("train", "test"):
        write(folder, split, small((0, 1, 0, 2**62)).replace_schema_metadata(None))


def bytes_that_are_text(folder):
    images = pa.array([{"bytes": "iVBOR"}] * 4, pa.struct([("bytes", pa.string())]))
    write(folder, "train", small().set_column(0, "image", images))


def cut_off(folder):
    rows = {"class_names": '["a", "b"]', ROWS: '{"train": 4, "test": 9}'}
    for split in ("train", "test"):
        write(folder, split, small().replace_schema_metadata(rows))


def not_parquet(folder):
    (folder / "test.parquet").write_bytes(b"PAR1 and then nothing of use")


def not_images(folder):
    write(folder, "train", table([b"text"] * 20, [0] * 20, ["a", "b"]))


def gone(folder):
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (gone, "does not exist; expected a folder"),
        (no_test_split, r"has no test split \(it holds train\.parquet\); expected test\.parquet"),
        (empty_folder, "the test split test of .* holds no .parquet files; .*ImageFolder"),
        (empty_split, "the test split of .* has no rows"),
        (no_label, r"test\.parquet has the columns image: .*; expected image: .* and label: an"),
        (no_image, "has the columns photo: .*; expected image"),
        (text_labels, "label: string; expected image"),
        (label_too_large, "labels of the test split of .* go from 0 to 2; expected 0 to 1 for 2"),
        (label_missing, "labels of the training split of .* go from -1 to 1; expected 0 to 1"),
        (negative_label, "labels of the test split of .* go from -1 to 1; expected 0 to 1"),
        (broken_names, "class names in the schema metadata of .* cannot be read"),
        (names_that_are_no_list, "are not a list of names"),
        (other_names, r"the classes \('a', 'b'\) and .*\('b', 'a'\); expected the same in every"),
        (one_class, "has one class, 'a'; expected two or more"),
        (
            labels_that_are_ids,
            "go up to 4611686018427387904 for 4 training images; expected",
        ),
        (bytes_that_are_text, "image: struct<bytes: string>.*; expected image"),
        (cut_off, "holds 4 training and 4 test images; expected 4 and 9: its conversion was cut"),
        (not_parquet, r"test\.parquet cannot be read"),
        (not_images, "none of the first 16 images of the training split"),
    ],
)
def test_a_mistake_is_named_in_one_line(tmp_path, spoil, message):
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        write(folder, split, small())
    spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        describe(options(folder, holdout=1))
    assert "\n" not in str(caught.value)
    assert "; expected" in str(caught.value)


def test_a_sample_may_hold_more_unreadable_images_than_the_split_may(tmp_path):
    """Those of a few images are chance, and the same command would draw the same ones again."""
    write_parquet(tmp_path)
    strict = options(tmp_path, max_corrupt=0.05)
    rows = selection(strict, ParquetSource(str(tmp_path)).layout())["train"]
    write_parquet(tmp_path, corrupt=(int(rows[spread_rows(len(rows), 4)[1]]),))
    assert load(strict).corrupt == 1
    assert len(load_split(strict, "train", 4)) == 3


def test_no_readable_held_out_image_is_told(tmp_path):
    write_parquet(tmp_path)
    one = options(tmp_path, holdout=1, max_corrupt=0.5)
    (held,) = selection(one, ParquetSource(str(tmp_path)).layout())["holdout"].tolist()
    write_parquet(tmp_path, corrupt=(held,))
    with pytest.raises(DataError, match=r"none of the 1 held-out images .*raise data\.holdout"):
        load(one)
    with pytest.raises(DataError, match=r"none of 1 images of the holdout split"):
        load_split(one, "holdout")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"holdout": 40}, r"data\.holdout is 40 of 40 training images"),
        ({"limit": 5}, r"data\.holdout is 5 of 5 training images"),
        ({"uri": None}, r"without a data\.uri"),
        ({"name": "parqet"}, 'data.name is "parqet"; .*did you mean "parquet"'),
        ({"name": "cifar10"}, 'did you mean "CIFAR10"'),
        ({"name": "qqqq"}, r"expected one of digits, parquet, .*; change data\.name"),
        ({"uri": "nothing://x"}, "cannot be opened"),
        ({"uri": "ftp://127.0.0.1:9/x"}, "cannot be opened .*refused"),
        (
            {"uri": "s3://bucket/set::file://tmp"},
            "has s3 before .::.; expected an archive or a cache",
        ),
        ({"uri": "zip://train::/nowhere.zip"}, "cannot be opened .*No such file"),
        ({"uri": "reference://x"}, "cannot be opened .*argument"),
        ({"uri": f"zip://train::{__file__}"}, "cannot be opened .*not a zip file"),
    ],
)
def test_a_mistake_in_the_options_is_named(tmp_path, changes, message):
    write_parquet(tmp_path)
    with pytest.raises(DataError, match=message):
        describe(options(tmp_path, **changes))


def test_a_back_end_that_does_not_start_is_told_in_one_line(monkeypatch):
    def fails(uri):
        raise OSError("Unable to load libjvm\ndlopen failed")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fails)
    with pytest.raises(DataError, match=r"opened \(Unable to load libjvm dlopen failed\)"):
        describe(options("hdfs://nowhere/x"))


def test_a_file_is_not_a_folder(tmp_path):
    write_parquet(tmp_path)
    with pytest.raises(DataError, match="is a file; expected a folder"):
        describe(options(tmp_path / "train.parquet"))


def test_images_that_are_not_square_need_a_size(tmp_path):
    for split in ("train", "test"):
        files = [encode(image[:, :6]) for image in pixels(4)]
        write(tmp_path, split, table(files, [0, 1, 0, 1]))
    with pytest.raises(DataError, match=r"images are 8x6 pixels; .*set data\.image_size"):
        describe(options(tmp_path, holdout=1))
    assert describe(options(tmp_path, holdout=1, image_size=4)).image_size == 4


def test_a_uri_with_credentials_is_refused():
    with pytest.raises(StorageError, match="credentials"):
        describe(options("s3://key:secret@bucket/folder"))


def test_any_fsspec_filesystem_will_do(tmp_path):
    write_parquet(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/images", recursive=True)
    data, expected = load(options("memory://images")), load(options(tmp_path))
    np.testing.assert_array_equal(data.train.images, expected.train.images)
    assert ParquetSource("memory://images").full_uri == "memory:///images"
    assert ParquetSource(str(tmp_path)).full_uri == f"file://{tmp_path}"


def test_a_fingerprint_tells_content_from_content_and_not_place_from_place(tmp_path):
    for place in ("here", "there"):
        write_parquet(tmp_path / place)
    here, there = (describe(options(tmp_path / place)) for place in ("here", "there"))
    assert here.fingerprint == there.fingerprint
    write_parquet(tmp_path / "there", train=41)
    assert describe(options(tmp_path / "there")).fingerprint != here.fingerprint


@pytest.mark.timeout(150)
def test_a_hub_that_cannot_be_reached_is_named(tmp_path):
    """Its client raises errors that are no OSErrors."""
    pytest.importorskip("huggingface_hub")
    program = (
        "from stp_ray import backends\n"
        "from stp_ray.data import DataOptions, describe\n"
        "from stp_ray.errors import DataError\n"
        "backends.PAUSES = ()\n"
        "try:\n    describe(DataOptions(name='parquet', uri='hf://datasets/nobody/nothing'))\n"
        "except DataError as error:\n    print(error)\n"
    )
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | nowhere, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.stdout.startswith("hf://datasets/nobody/nothing cannot be read ("), done.stderr


@pytest.mark.parametrize("linked", ["train/more", "train", "data"])
def test_linked_folders_are_read(tmp_path, linked):
    home = tmp_path / "set" / ("data" if linked == "data" else "")
    write_parquet(tmp_path / "flat", train=40)
    (home / "train").mkdir(parents=True)
    shutil.copy(tmp_path / "flat" / "test.parquet", home / "test.parquet")
    shutil.copy(tmp_path / "flat" / "train.parquet", home / "train" / "a.parquet")
    place = tmp_path / "set" / linked
    if linked == "train/more":
        place.mkdir()
        shutil.copy(tmp_path / "flat" / "train.parquet", place / "b.parquet")
    expected = describe(options(tmp_path / "set"))
    shutil.move(place, tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    assert describe(options(tmp_path / "set")) == expected
    assert expected.train_rows == (75 if linked == "train/more" else 35)


def test_a_folder_that_links_lead_to_again_is_read_once(tmp_path):
    write_parquet(tmp_path, train=40)
    (tmp_path / "train" / "v1").mkdir(parents=True)
    (tmp_path / "train.parquet").rename(tmp_path / "train" / "v1" / "a.parquet")
    (tmp_path / "train" / "latest").symlink_to("v1")
    for name in ("self", "again"):
        (tmp_path / "train" / name).symlink_to(tmp_path / "train")
    assert describe(options(tmp_path)).train_rows == 35


def test_a_hidden_link_leaves_the_folder_that_it_leads_to(tmp_path):
    write_parquet(tmp_path, train=40)
    for day in ("day-1", "day-2"):
        (tmp_path / "train" / day).mkdir(parents=True)
        shutil.copy(tmp_path / "train.parquet", tmp_path / "train" / day / "a.parquet")
    (tmp_path / "train.parquet").unlink()
    (tmp_path / "train" / "_latest").symlink_to("day-2")
    assert describe(options(tmp_path)).train_rows == 75


def test_a_file_that_a_set_names_twice_counts_twice(tmp_path):
    """As a copy would; a folder that several links lead to counts once."""
    write_parquet(tmp_path, train=40)
    (tmp_path / "train").mkdir()
    (tmp_path / "train.parquet").rename(tmp_path / "train" / "a.parquet")
    (tmp_path / "train" / "b.parquet").symlink_to("a.parquet")
    assert describe(options(tmp_path)).train_rows == 75


@pytest.mark.parametrize("file", ["{}/set.zip", "set.zip", "file:set.zip"])
def test_a_set_within_an_archive_is_found_by_other_processes(tmp_path, monkeypatch, file):
    write_parquet(tmp_path / "set")
    shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    source = ParquetSource(f"zip://::{file.format(tmp_path)}")
    uri, layout = source.full_uri, source.layout()
    monkeypatch.chdir("/")
    assert ParquetSource(uri).layout() == layout


def test_a_tar_archive_is_refused(tmp_path):
    """Its one handle is moved by every thread that reads."""
    write_parquet(tmp_path / "set")
    archive = shutil.make_archive(str(tmp_path / "set"), "tar", tmp_path / "set")
    with pytest.raises(DataError, match=r"is a tar archive, .*; expected .*; unpack it"):
        describe(options(f"tar://::{archive}"))


def test_large_images_are_read_few_at_a_time(tmp_path, monkeypatch):
    """Arrow cannot read two gigabytes of one column at once."""
    monkeypatch.setattr(parquet, "_CHUNK_BYTES", 2_000)
    write_parquet(tmp_path, train=40, group=40)
    source = ParquetSource(str(tmp_path))
    (part,) = source.parts("train", np.arange(40))
    chunks = list(source.read(part))
    assert np.concatenate([chunk.rows for chunk in chunks]).tolist() == list(range(40))
    assert max(len(chunk.rows) for chunk in chunks) <= 40 * 2_000 // part.size + 1 < 40


def upload(folder, bucket, place, splits=("train", "test")):
    """A set's files, into a bucket that may have to be made."""
    client = pytest.importorskip("boto3").client("s3")
    client.create_bucket(Bucket=bucket)
    for split in splits:
        client.upload_file(str(folder / f"{split}.parquet"), bucket, f"{place}/{split}.parquet")


def test_s3_by_the_endpoint_of_the_environment(s3, tmp_path):
    write_parquet(tmp_path)
    upload(tmp_path, "images", "a")
    data, expected = load(options("s3://images/a")), load(options(tmp_path))
    np.testing.assert_array_equal(data.train.images, expected.train.images)
    with pytest.raises(DataError, match="s3://images/b does not exist"):
        describe(options("s3://images/b"))
    with pytest.raises(DataError, match="s3://nobucket/b does not exist"):
        describe(options("s3://nobucket/b"))


def test_keys_below_a_folder_without_a_name_are_told(s3, tmp_path):
    write_parquet(tmp_path)
    upload(tmp_path, "slashes", "k/")
    for uri in ("s3://slashes/k", "s3://slashes/k/", "s3://slashes/k//"):
        with pytest.raises(DataError, match=r"keys begin with slashes/k//; .*; copy the objects"):
            describe(options(uri))


def test_a_split_that_was_added_since_is_found(s3, tmp_path):
    write_parquet(tmp_path)
    upload(tmp_path, "later", "a", ["train"])
    with pytest.raises(DataError, match="has no test split"):
        describe(options("s3://later/a"))
    upload(tmp_path, "later", "a", ["test"])
    assert describe(options("s3://later/a")).test_rows == 12


def test_cifar10_is_read_quickly():
    folder = real_data("cifar10")
    started = time.monotonic()
    summary = describe(options(folder, holdout=512))
    assert time.monotonic() - started < 20
    assert summary.class_names[:2] == ["airplane", "automobile"]
    assert (summary.train_rows, summary.test_rows, summary.image_size) == (49488, 10000, 32)
    data = load(options(folder, holdout=512, limit=6000))
    assert data.corrupt == 0
    assert data.train.images.shape == (5488, 3, 32, 32)
    mean = data.test.images.mean(axis=(0, 2, 3)) / 255
    # The known mean of CIFAR-10's pixels.
    assert np.abs(mean - [0.494, 0.485, 0.450]).max() < 0.01
