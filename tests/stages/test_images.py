import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from stp_ray.data import DataOptions, describe, load
from stp_ray.stages import images
from stp_ray.stages.images import Images, SharedImages, share
from tests.data.samples import encode, table, write_parquet

CPU = torch.device("cpu")


@pytest.fixture
def by_class(tmp_path):
    """Options of data whose rows are sorted by class; an image of class c is of the grey 20 c."""
    for split, rows in (("train", 400), ("test", 20)):
        labels = [row * 10 // rows for row in range(rows)]
        files = [encode(np.full((3, 8, 8), 20 * label, np.uint8)) for label in labels]
        pq.write_table(table(files, labels), tmp_path / f"{split}.parquet", row_group_size=32)
    unchanged = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    return DataOptions(name="parquet", uri=str(tmp_path), holdout=40, **unchanged)


def test_statistics_of_streamed_data_are_measured_on_every_class(by_class):
    streamed = Images(by_class, describe(by_class), None)
    few = torch.cat(list(streamed.calibration(0, 50, CPU)))
    greys = (few[:, 0, 0, 0] * 255).round().int()
    assert torch.bincount(greys // 20).tolist() == [5] * 10
    resident = share(by_class, describe(by_class), in_process=True)
    assert torch.equal(few, torch.cat(list(resident.calibration(0, 50, CPU))))


@pytest.mark.parametrize(
    ("asked", "sizes"), [(50, [50]), (128, [128]), (200, [100, 100]), (255, [127, 127])]
)
def test_few_images_are_left_out_of_statistics(by_class, asked, sizes):
    resident = share(by_class, describe(by_class), in_process=True)
    assert [len(batch) for batch in resident.calibration(0, asked, CPU)] == sizes


def test_a_training_can_go_on_where_anothers_epochs_end(by_class):
    resident = share(by_class, describe(by_class), in_process=True)
    first, second = (resident.epochs(0, 40, 0, 1, CPU, after=after) for after in (0, 3))

    def labels(epochs, epoch, step=0):
        return torch.cat([labels for _, labels in epochs(epoch, step)])

    assert torch.equal(labels(second, 1, 2), labels(first, 4, 2))
    assert not torch.equal(labels(second, 0), labels(first, 0))


def test_a_sample_of_a_streamed_split_is_of_every_class(by_class):
    streamed = Images(by_class, describe(by_class), None)
    labels = torch.cat([labels for _, labels in streamed.batches("holdout", CPU, 10)])
    assert labels.tolist() == list(range(10))


@pytest.mark.parametrize("in_process", [True, False])
def test_images_that_cannot_be_decoded_are_not_counted(tmp_path, monkeypatch, in_process):
    write_parquet(tmp_path, corrupt=(3, 17))
    options = DataOptions(name="parquet", uri=str(tmp_path), holdout=5, max_corrupt=0.1)
    summary, data = describe(options), load(options)
    monkeypatch.setattr(images.ray, "get", lambda reference: data)
    shared = SharedImages(options, summary, [None])
    local = (share(options, summary, in_process=True) if in_process else shared).here()
    assert local.summary.train_rows == len(data.train) < summary.train_rows == 35
