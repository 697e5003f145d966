import asyncio
import os
import pickle
from hashlib import md5
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image
from torchvision import datasets

from stp_ray.data import DataOptions, dataset_to_parquet, describe, folder_to_parquet, load
from stp_ray.data.convert import is_saved_dataset
from stp_ray.errors import DataError, StorageError
from tests.data.samples import pixels


def folder_of_images(root, split, classes=("cat", "dog"), each=6, seed=0):
    for index, name in enumerate(classes):
        (root / split / name).mkdir(parents=True)
        for number, image in enumerate(pixels(each, seed=seed + index)):
            file = root / split / name / f"{number}.png"
            Image.fromarray(image.transpose(1, 2, 0)).save(file)


def options(root, **changes):
    return DataOptions(**{"name": "ImageFolder", "uri": str(root), "holdout": 3, **changes})


def test_digits_are_the_same_every_time():
    options = DataOptions(holdout=128)
    summary, data = describe(options), load(options)
    assert (summary.train_rows, summary.holdout_rows, summary.test_rows) == (1309, 128, 360)
    assert (len(data.train), len(data.holdout), len(data.test)) == (1309, 128, 360)
    assert data.class_names == list("0123456789")
    images = data.train.images
    assert images.shape[1:] == (3, 8, 8)
    assert (images.min(), images.max()) == (0, 255)
    assert (images[:, 0] == images[:, 1]).all() and (images[:, 0] == images[:, 2]).all()
    counts = np.bincount(data.test.labels)
    assert counts.min() >= 34 and counts.max() <= 38
    every = [image.tobytes() for s in (data.train, data.holdout, data.test) for image in s.images]
    assert len(every) == 1797
    np.testing.assert_array_equal(load(options).test.images, data.test.images)
    assert load(DataOptions(holdout=128, image_size=32)).test.images.shape == (360, 3, 32, 32)


@pytest.mark.parametrize("test", ["test", "val"])
def test_folders_of_images(tmp_path, test):
    folder_of_images(tmp_path, "train")
    folder_of_images(tmp_path, test, each=2, seed=9)
    summary = describe(options(tmp_path))
    assert summary.class_names == ["cat", "dog"]
    assert (summary.train_rows, summary.test_rows, summary.image_size) == (9, 4, 8)
    data = load(options(tmp_path, limit=6))
    assert (len(data.train), len(data.holdout), len(data.test)) == (3, 3, 4)
    # The first rows are of every class although the files are sorted by it.
    assert set(data.train.labels.tolist() + data.holdout.labels.tolist()) == {0, 1}
    cat = {image.tobytes() for image in pixels(2, seed=9)}
    for image, label in zip(data.test.images, data.test.labels, strict=True):
        assert (image.tobytes() in cat) == (label == 0)


def test_a_fingerprint_tells_content_from_content_and_not_place_from_place(tmp_path):
    found = []
    for place in ("here", "there"):
        folder_of_images(tmp_path / place, "train")
        folder_of_images(tmp_path / place, "test")
        found.append(describe(options(tmp_path / place)).fingerprint)
    one = tmp_path / "there" / "train"
    (one / "cat" / "0.png").rename(one / "dog" / "00.png")
    found.append(describe(options(tmp_path / "there")).fingerprint)
    Image.new("RGB", (24, 24)).save(tmp_path / "here" / "test" / "dog" / "1.png")
    found.append(describe(options(tmp_path / "here")).fingerprint)
    assert found[0] == found[1] and len(set(found)) == 3
    digits = [describe(DataOptions(holdout=count)).fingerprint for count in (64, 128)]
    assert digits[0] == digits[1] not in found


def test_a_broken_file_in_a_folder_is_skipped(tmp_path):
    folder_of_images(tmp_path, "train")
    folder_of_images(tmp_path, "test")
    (tmp_path / "test" / "cat" / "0.png").write_bytes(b"nothing")
    data = load(options(tmp_path, max_corrupt=0.1))
    assert data.corrupt == 1
    assert len(data.test) == 11


def test_a_disk_that_does_not_answer_is_not_a_broken_file(tmp_path, monkeypatch):
    """Or a run would go on without the image, in another order."""
    folder_of_images(tmp_path, "train")
    folder_of_images(tmp_path, "test")
    lost, real = tmp_path / "train" / "cat" / "3.png", Path.read_bytes

    def read_bytes(path):
        if path == lost:
            raise OSError(116, "Stale file handle", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(DataError, match=r"3\.png cannot be read \(.*Stale file handle"):
        load(options(tmp_path, max_corrupt=0.5))


def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    folder_of_images(tmp_path, "train")
    folder_of_images(tmp_path, "test")

    def refuses(path, *more):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuses)
        with pytest.raises(DataError, match=r"cannot be read \(.*denied.*/train"):
            describe(options(tmp_path))
    monkeypatch.setattr(Path, "is_dir", refuses)
    with pytest.raises(DataError, match=r"cannot be read \(.*denied"):
        describe(options(tmp_path))


def test_a_class_that_is_no_text_is_refused_before_anything_is_made_of_it(tmp_path):
    """As an archive of another age unpacks it: the name would be in no report and no file."""
    latin = os.fsdecode(b"caf\xe9")
    folder_of_images(tmp_path / "photos", "train", classes=(latin, "the"))
    folder_of_images(tmp_path / "photos", "test", classes=(latin, "the"))
    with pytest.raises(DataError, match=r"class 'caf\\udce9' is not UTF-8; .*rename"):
        describe(options(tmp_path / "photos"))
    with pytest.raises(DataError, match=r"class 'caf\\udce9' is not UTF-8"):
        folder_to_parquet(str(tmp_path / "photos"), str(tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def no_test(root):
    (root / "test").rename(root / "tset")


def other_classes(root):
    (root / "test" / "cat").rename(root / "test" / "bird")


def no_classes(root):
    (root / "train").rename(root / "aside")
    (root / "train").mkdir()


def no_images(root):
    for file in (root / "train").rglob("*.png"):
        file.write_bytes(b"nothing")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_test, r"lacks a split \(it holds train, tset\); expected the folders train, and test"),
        (other_classes, "differ in classes .bird, cat.; expected the same folders"),
        (no_classes, "train cannot be used .*; expected one folder with images for each class"),
        (no_images, "cannot be decoded; expected image files"),
    ],
)
def test_a_mistake_in_folders_is_named(tmp_path, spoil, message):
    folder_of_images(tmp_path, "train")
    folder_of_images(tmp_path, "test")
    spoil(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        describe(options(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"uri": None}, r"ImageFolder has no data\.uri"),
        ({"uri": "s3://bucket/x"}, "is not a local folder"),
        ({"uri": "missing"}, "missing is not a folder"),
        ({"loading": "stream"}, "expected Parquet, the only kind that streams"),
        ({"image_size": 2000, "resident_limit_mb": 1}, "MiB decoded; expected at most 1 MiB"),
        ({"name": "CIFAR10"}, r"CIFAR10 is not complete .*torchvision\.datasets\.CIFAR10\("),
    ],
)
def test_a_mistake_in_the_options_of_a_folder_is_named(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    folder_of_images(tmp_path, "train")
    folder_of_images(tmp_path, "test")
    with pytest.raises(DataError, match=message):
        describe(options(tmp_path, **changes))


@pytest.mark.parametrize(("name", "key"), [("CIFAR10", "labels"), ("CIFAR100", "fine_labels")])
def test_cifar_in_the_files_of_its_authors(tmp_path, monkeypatch, name, key):
    kind = getattr(datasets, name)
    folder = tmp_path / kind.base_folder
    folder.mkdir()

    def write(file, content):
        data = pickle.dumps(content)
        (folder / file).write_bytes(data)
        return [file, md5(data).hexdigest()]

    def batch(file, seed):
        images = pixels(10, 32, seed)
        return write(file, {"data": images.reshape(10, -1), key: [i % 2 for i in range(10)]})

    monkeypatch.setattr(kind, "train_list", [batch("one", 1), batch("two", 2)])
    monkeypatch.setattr(kind, "test_list", [batch("three", 3)])
    meta_key = kind.meta["key"]
    file, checksum = write("names", {meta_key: ["cat", "dog"]})
    monkeypatch.setattr(kind, "meta", {"filename": file, "key": meta_key, "md5": checksum})

    cifar = options(tmp_path, name=name)
    summary = describe(cifar)
    assert summary.class_names == ["cat", "dog"]
    assert (summary.train_rows, summary.test_rows, summary.image_size) == (17, 10, 32)
    np.testing.assert_array_equal(load(cifar).test.images, pixels(10, 32, 3))

    (folder / "two").write_bytes(b"damaged")
    with pytest.raises(DataError, match="is not complete"):
        describe(cifar)


def test_a_folder_becomes_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr("stp_ray.data.convert._ROWS_PER_GROUP", 2)
    monkeypatch.setattr("stp_ray.data.convert._GROUPS_PER_FILE", 4)
    told = []
    images = tmp_path / "images"
    folder_of_images(images, "train")
    folder_of_images(images, "val", each=2, seed=9)
    counts = folder_to_parquet(
        str(images), str(tmp_path / "set"), lambda done, total: told.append((done, total))
    )
    assert counts == {"train": 12, "test": 4}
    assert told == [(done, 16) for done in range(2, 17, 2)]
    assert len(list((tmp_path / "set" / "train").iterdir())) == 2
    converted = load(options(tmp_path / "set", name="parquet"))
    original = load(options(images))
    assert converted.class_names == original.class_names
    np.testing.assert_array_equal(converted.train.images, original.train.images)
    np.testing.assert_array_equal(converted.holdout.labels, original.holdout.labels)
    with pytest.raises(DataError, match="holds files already"):
        folder_to_parquet(str(images), str(tmp_path / "set"))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        folder_to_parquet(str(images), str(tmp_path / "file" / "set"))


def test_keys_that_no_path_has_are_converted(s3, tmp_path, caplog):
    """With an empty segment, and a folder that S3's console made."""
    boto3 = pytest.importorskip("boto3")
    folder_of_images(tmp_path, "train")
    folder_of_images(tmp_path, "test", each=2)
    bucket, image = boto3.client("s3"), (tmp_path / "train" / "cat" / "0.png").read_bytes()
    bucket.create_bucket(Bucket="odd")
    for file in tmp_path.rglob("*.png"):
        key = f"images/{file.relative_to(tmp_path).as_posix()}"
        bucket.put_object(Bucket="odd", Key=key, Body=file.read_bytes())
    bucket.put_object(Bucket="odd", Key="images/train/cat//double.png", Body=image)
    bucket.put_object(Bucket="odd", Key="set/", Body=b"")
    counts = folder_to_parquet("s3://odd/images", "s3://odd/set")
    assert counts == {"train": 13, "test": 4} and "could not be read" not in caplog.text
    assert load(options("s3://odd/set", name="parquet")).corrupt == 0


def test_many_images_are_asked_for_at_once(s3, tmp_path, monkeypatch):
    """One after the other, each would cost the way to the store and back."""
    s3fs = pytest.importorskip("s3fs")
    folder_of_images(tmp_path, "train", each=20)
    folder_of_images(tmp_path, "test", each=2)
    fsspec.filesystem("s3").put(f"{tmp_path}/", f"{s3}/many/", recursive=True)
    read, waiting, most = s3fs.S3FileSystem._cat_file, set(), []

    async def cat_file(self, path, *arguments, **options):
        waiting.add(path)
        most.append(len(waiting))
        await asyncio.sleep(0.02)
        waiting.remove(path)
        return await read(self, path, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", cat_file)
    assert folder_to_parquet(f"{s3}/many", f"{s3}/set") == {"train": 40, "test": 4}
    assert max(most) == 40
    monkeypatch.undo()
    converted = load(options(f"{s3}/set", name="parquet"))
    np.testing.assert_array_equal(converted.train.images, load(options(tmp_path)).train.images)


def test_images_that_could_not_be_read_are_told(tmp_path, monkeypatch, caplog):
    folder_of_images(tmp_path / "images", "train")
    folder_of_images(tmp_path / "images", "test", each=2)
    read = LocalFileSystem.cat_file

    def cat_file(self, path, *arguments, **options):
        if path.endswith("train/cat/3.png"):
            raise PermissionError(path)
        return read(self, path, *arguments, **options)

    monkeypatch.setattr(LocalFileSystem, "cat_file", cat_file)
    folder_to_parquet(str(tmp_path / "images"), str(tmp_path / "set"))
    assert "1 of 16 images could not be read" in caplog.text


def test_what_links_lead_to_is_converted_and_an_unreadable_folder_ends_it(tmp_path, monkeypatch):
    folder_of_images(tmp_path / "elsewhere", "train")
    images = tmp_path / "images"
    folder_of_images(images, "train", classes=["dog"])
    folder_of_images(images, "test", each=2, seed=9)
    (images / "train" / "cat").symlink_to(tmp_path / "elsewhere" / "train" / "cat")
    (images / "train" / "dog" / "more").symlink_to(tmp_path / "elsewhere" / "train" / "dog")
    assert folder_to_parquet(str(images), str(tmp_path / "set")) == {"train": 18, "test": 4}
    converted = load(options(tmp_path / "set", name="parquet"))
    np.testing.assert_array_equal(converted.train.images, load(options(images)).train.images)
    scandir = os.scandir

    def refuses(path):
        if str(path).endswith("train/dog"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(DataError, match=r"images cannot be read \(.*denied.*train/dog"):
        folder_to_parquet(str(images), str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_classes_that_are_links_to_one_folder_are_converted(tmp_path):
    images = tmp_path / "images"
    folder_of_images(images, "test", each=2)
    folder_of_images(tmp_path, "pets", each=3)
    (images / "train").mkdir()
    for name in ("cat", "dog"):
        (images / "train" / name).symlink_to(tmp_path / "pets")
    (tmp_path / "pets" / "round").symlink_to(tmp_path / "pets")
    assert folder_to_parquet(str(images), str(tmp_path / "set")) == {"train": 12, "test": 4}
    labels = load(options(tmp_path / "set", name="parquet")).train.labels
    assert abs(sum(labels) - len(labels) / 2) <= 2


def test_a_folder_is_listed_anew_for_each_conversion(tmp_path, monkeypatch):
    bucket = fsspec.filesystem("memory")
    folder_of_images(tmp_path, "train")
    folder_of_images(tmp_path, "test")
    bucket.put(f"{tmp_path}/", "/anew/images/", recursive=True)
    forgotten = []
    monkeypatch.setattr(type(bucket), "invalidate_cache", lambda *_: forgotten.append(1))
    folder_to_parquet("memory://anew/images", "memory://anew/set")
    assert forgotten


def test_folders_are_converted_between_object_stores(tmp_path):
    folder_of_images(tmp_path, "train")
    folder_of_images(tmp_path, "test", each=2, seed=9)
    bucket = fsspec.filesystem("memory")
    bucket.put(f"{tmp_path}/", "/convert/images/", recursive=True)
    folder_to_parquet("memory://convert/images", "memory://convert/set")
    converted = load(options("memory://convert/set", name="parquet"))
    np.testing.assert_array_equal(converted.train.images, load(options(tmp_path)).train.images)
    bucket.rm("/convert/images/test", recursive=True)
    with pytest.raises(DataError, match="lacks a split"):
        folder_to_parquet("memory://convert/images", "memory://convert/other")


def test_an_image_that_is_gone_is_corrupt_and_an_outage_ends_the_conversion(tmp_path, monkeypatch):
    images = tmp_path / "images"
    folder_of_images(images, "train")
    folder_of_images(images, "test", each=2, seed=9)
    read = LocalFileSystem.cat_file

    def fails(error):
        def cat_file(self, path, *more):
            if path.endswith("train/cat/3.png"):
                raise error
            return read(self, path, *more)

        return cat_file

    monkeypatch.setattr(LocalFileSystem, "cat_file", fails(FileNotFoundError("gone")))
    folder_to_parquet(str(images), str(tmp_path / "set"))
    assert load(options(tmp_path / "set", name="parquet", max_corrupt=0.5)).corrupt == 1
    monkeypatch.setattr(LocalFileSystem, "cat_file", fails(OSError(5, "connection reset")))
    with pytest.raises(DataError, match=r"train/cat/3.png cannot be read .*connection reset"):
        folder_to_parquet(str(images), str(tmp_path / "other"))


def test_a_hugging_face_data_set_becomes_parquet(tmp_path):
    hugging = pytest.importorskip("datasets")
    features = hugging.Features(
        {"img": hugging.Image(), "label": hugging.ClassLabel(names=["cat", "dog"])}
    )

    def split(count, seed, withheld=False):
        images = [Image.fromarray(each.transpose(1, 2, 0)) for each in pixels(count, 8, seed)]
        rows = {"img": images, "label": [-1 if withheld else i % 2 for i in range(count)]}
        return hugging.Dataset.from_dict(rows, features=features)

    whole = hugging.DatasetDict(train=split(20, 1), validation=split(6, 2))
    assert dataset_to_parquet(whole, str(tmp_path / "set")) == {"train": 20, "test": 6}
    converted = load(options(tmp_path / "set", name="parquet"))
    assert converted.class_names == ["cat", "dog"]
    np.testing.assert_array_equal(converted.test.images, pixels(6, 8, 2))
    np.testing.assert_array_equal(converted.test.labels, [0, 1] * 3)
    with pytest.raises(DataError, match="has the splits train; expected"):
        dataset_to_parquet(hugging.DatasetDict(train=whole["train"]), str(tmp_path / "other"))
    # who sets a challenge keeps the labels of the test images
    challenge = hugging.DatasetDict(**whole, test=split(4, 3, withheld=True))
    assert dataset_to_parquet(challenge, str(tmp_path / "kept")) == {"train": 20, "test": 6}
    challenge["test"] = challenge["test"].remove_columns("label").add_column("label", [None] * 4)
    assert dataset_to_parquet(challenge, str(tmp_path / "none")) == {"train": 20, "test": 6}
    del challenge["validation"]
    with pytest.raises(DataError, match=r"no labels in test; .*add a validation split"):
        dataset_to_parquet(challenge, str(tmp_path / "other"))
    with pytest.raises(DataError, match="of type Dataset; expected a DatasetDict"):
        dataset_to_parquet(whole["train"], str(tmp_path / "other"))
    assert not is_saved_dataset(str(tmp_path))
    whole.save_to_disk(tmp_path / "saved")
    assert is_saved_dataset(str(tmp_path / "saved"))


def test_a_set_that_is_sorted_by_class_is_mixed(tmp_path):
    """For a stream shuffles no further than its buffer."""
    hugging = pytest.importorskip("datasets")
    labels = [i // 50 for i in range(200)]
    kinds = hugging.Features({"image": hugging.Image(), "label": hugging.Value("int64")})
    images = [Image.fromarray(each.transpose(1, 2, 0)) for each in pixels(200, 8, 0)]
    split = hugging.Dataset.from_dict({"image": images, "label": labels}, features=kinds)
    dataset_to_parquet(hugging.DatasetDict(train=split, test=split), str(tmp_path))
    stored = {
        name: pq.read_table(tmp_path / name).column("label").to_pylist()
        for name in ("train", "test")
    }
    assert stored["test"] == labels and sorted(stored["train"]) == labels
    for start in range(0, 200, 50):
        assert len(set(stored["train"][start : start + 50])) == 4


@pytest.mark.parametrize(
    ("labels", "kind"), [(["cat", "dog"], "string"), ([0.5, 1.0], "float"), ([True, False], "bool")]
)
def test_labels_that_are_no_classes_are_refused_before_anything_is_written(tmp_path, labels, kind):
    hugging = pytest.importorskip("datasets")
    images = [Image.fromarray(each.transpose(1, 2, 0)) for each in pixels(2, 8, 0)]
    split = hugging.Dataset.from_dict({"image": images, "label": labels})
    numbers = hugging.Dataset.from_dict({"image": images, "label": [0, 1]})
    for train, name in ((split, "train"), (numbers, "test")):
        whole = hugging.DatasetDict(train=train, test=split)
        expected = f"label of {name} holds .*{kind}.*; expected a ClassLabel"
        with pytest.raises(DataError, match=expected):
            dataset_to_parquet(whole, str(tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_classes_that_differ_between_splits_are_refused(tmp_path):
    hugging = pytest.importorskip("datasets")
    images = [Image.fromarray(each.transpose(1, 2, 0)) for each in pixels(4, 8, 0)]

    def split(*names):
        kinds = {"image": hugging.Image(), "label": hugging.ClassLabel(names=list(names))}
        rows = {"image": images, "label": [0, 1, 0, 1]}
        return hugging.Dataset.from_dict(rows, features=hugging.Features(kinds))

    whole = hugging.DatasetDict(train=split("cat", "dog"), test=split("dog", "cat"))
    with pytest.raises(DataError, match=r"classes of train .*cat.*those of test .*the same"):
        dataset_to_parquet(whole, str(tmp_path / "set"))


def hugging_split(hugging, labels):
    images = [Image.fromarray(each.transpose(1, 2, 0)) for each in pixels(len(labels), 8, 0)]
    kinds = {"image": hugging.Image(), "label": hugging.Value("int64")}
    return hugging.Dataset.from_dict(
        {"image": images, "label": labels}, features=hugging.Features(kinds)
    )


def test_a_test_split_without_labels_or_images(tmp_path):
    hugging = pytest.importorskip("datasets")
    split = hugging_split(hugging, [0, 1, 0])
    without = split.remove_columns("label")
    whole = hugging.DatasetDict(train=split, test=without, validation=split)
    assert dataset_to_parquet(whole, str(tmp_path / "set")) == {"train": 3, "test": 3}
    for test, message in (
        (without, "no labels in test"),
        (split.remove_columns("image"), "test has the columns label; expected image and label"),
    ):
        whole = hugging.DatasetDict(train=split, test=test)
        with pytest.raises(DataError, match=message):
            dataset_to_parquet(whole, str(tmp_path / "other"))


def test_a_format_of_a_data_set_is_left_out(tmp_path):
    hugging = pytest.importorskip("datasets")
    split = hugging_split(hugging, [0, 1, 0])
    for number, other in enumerate(
        (split.with_format("pandas"), split.with_transform(lambda batch: {"x": batch["label"]}))
    ):
        whole = hugging.DatasetDict(train=other, test=other)
        target = str(tmp_path / str(number))
        assert dataset_to_parquet(whole, target) == {"train": 3, "test": 3}
        converted = load(options(target, name="parquet", holdout=1))
        np.testing.assert_array_equal(converted.test.images, pixels(3, 8, 0))


def test_a_column_of_several_images_a_row_is_refused(tmp_path):
    hugging = pytest.importorskip("datasets")
    images = [[Image.fromarray(each.transpose(1, 2, 0))] for each in pixels(2, 8, 0)]
    split = hugging.Dataset.from_dict({"image": images, "label": [0, 1]})
    whole = hugging.DatasetDict(train=split, test=split)
    with pytest.raises(DataError, match=r"holds .*; expected one image a row") as found:
        dataset_to_parquet(whole, str(tmp_path / "set"))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 3_000_000], [0, 1], r"go up to 3000000 for 2 training .*; .* all classes in a Class"),
        ([0, 1], [0, 2], r"labels of the test split of the data set go from 0 to 2; expected 0 to"),
        ([0, 1], [-1, 1], r"test split of the data set go from -1 to 1; expected 0 to 1"),
        ([0, 1, None], [0, 1], r"training split of the data set go from -1 to 1; expected 0 to 1"),
    ],
)
def test_numbers_that_are_no_classes_are_refused_before_anything_is_written(
    tmp_path, train, test, message
):
    hugging = pytest.importorskip("datasets")
    whole = hugging.DatasetDict(
        train=hugging_split(hugging, train), test=hugging_split(hugging, test)
    )
    with pytest.raises(DataError, match=message):
        dataset_to_parquet(whole, str(tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_a_conversion_that_was_cut_off_is_told(tmp_path):
    images = tmp_path / "images"
    folder_of_images(images, "train")
    folder_of_images(images, "test", each=2, seed=9)
    folder_to_parquet(str(images), str(tmp_path / "set"))
    (part,) = (tmp_path / "set" / "test").iterdir()
    pq.write_table(pq.read_table(part).slice(0, 3), part)
    with pytest.raises(DataError, match=r"3 test images; expected .* 4: its conversion was cut"):
        load(options(tmp_path / "set", name="parquet"))


def test_a_conversion_that_is_interrupted_leaves_nothing_and_begins_anew(tmp_path):
    images, target = tmp_path / "images", tmp_path / "set"
    folder_of_images(images, "train")
    folder_of_images(images, "test", each=2, seed=9)

    def interrupt(done, total):
        if done > 12:  # those of the first file are written
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder_to_parquet(str(images), str(target), interrupt)
    assert not [path for path in target.rglob("*") if path.is_file()]
    assert folder_to_parquet(str(images), str(target)) == {"train": 12, "test": 4}


def test_an_image_that_is_not_there_counts_as_corrupt(tmp_path):
    hugging = pytest.importorskip("datasets")
    images = [Image.fromarray(each.transpose(1, 2, 0)) for each in pixels(9, 8, 0)]
    rows = {"image": [*images, None], "label": [i % 2 for i in range(10)]}
    kinds = hugging.Features({"image": hugging.Image(), "label": hugging.Value("int64")})
    split = hugging.Dataset.from_dict(rows, features=kinds)
    whole = hugging.DatasetDict(train=split, test=split)
    assert dataset_to_parquet(whole, str(tmp_path / "set")) == {"train": 10, "test": 10}
    found = load(options(tmp_path / "set", name="parquet", max_corrupt=0.2))
    assert len(found.test) == 9
