"""Resumable states."""

import logging
import subprocess
import sys

import pytest
import torch

from stp_ray.artifacts import Checkpoints, Store
from stp_ray.errors import StorageError

pytestmark = pytest.mark.timeout(120)


def state(step):
    return {"weights": torch.full((3,), float(step)), "step": torch.tensor(step)}


def test_the_latest_checkpoint_comes_back_and_old_ones_go(store):
    checkpoints = Checkpoints(store)
    assert checkpoints.latest() is None
    for step in (0, 5, 10, 100_000_000):
        checkpoints.save(step, state(step), {"step": step, "lr": 0.1})
    assert store.names() == ["checkpoint-00000010", "checkpoint-100000000"]
    step, tensors, meta = checkpoints.latest()
    assert (step, meta) == (100_000_000, {"step": step, "lr": 0.1})
    assert torch.equal(tensors["weights"], state(step)["weights"])


def test_one_step_can_be_saved_twice(tmp_path):
    checkpoints = Checkpoints(Store(tmp_path), keep=1)
    checkpoints.save(3, state(1), {"try": 1})
    checkpoints.save(3, state(2), {"try": 2})
    assert checkpoints.latest()[2] == {"try": 2}
    assert Store(tmp_path).names() == ["checkpoint-00000003"]


def damage_marker(folder):
    folder.delete("complete.json")


def damage_state(folder):
    data = bytearray(folder.read_bytes("state.safetensors"))
    data[-1] ^= 1
    folder.write_bytes("state.safetensors", bytes(data))


def damage_meta(folder):
    folder.write_bytes("meta.json", b"{}")


def damage_missing(folder):
    folder.delete("state.safetensors")


def damage_format(folder):
    """With a checksum that fits."""
    marker = folder.read_json("complete.json")
    marker["sha256"]["state.safetensors"] = folder.write_bytes("state.safetensors", b"a pickle")
    folder.write_json("complete.json", marker)


def damage_meta_format(folder):
    marker = folder.read_json("complete.json")
    marker["sha256"]["meta.json"] = folder.write_bytes("meta.json", b"[1")
    folder.write_json("complete.json", marker)


def damage_marker_content(folder):
    folder.write_bytes("complete.json", b"[]")


def damage_marker_json(folder):
    folder.write_bytes("complete.json", b"{")


def damage_meta_json(folder):
    folder.write_bytes("meta.json", b"{")


@pytest.mark.parametrize(
    "damage",
    [
        damage_marker,
        damage_state,
        damage_meta,
        damage_missing,
        damage_format,
        damage_meta_format,
        damage_marker_content,
        damage_marker_json,
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(store, damage, caplog):
    checkpoints = Checkpoints(store)
    checkpoints.save(1, state(1), {})
    checkpoints.save(2, state(2), {})
    damage(store.child("checkpoint-00000002"))
    with caplog.at_level(logging.WARNING):
        assert checkpoints.latest()[0] == 1
    assert "passing over checkpoint-00000002" in caplog.text
    checkpoints.save(2, state(2), {})
    assert checkpoints.latest()[0] == 2


@pytest.mark.parametrize("file", ["complete.json", "state.safetensors", "meta.json"])
def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(tmp_path, monkeypatch, file):
    """Training would begin again from an older one, or from nothing."""
    checkpoints = Checkpoints(Store(tmp_path))
    checkpoints.save(1, state(1), {})
    checkpoints.save(2, state(2), {})
    read = Store.read_bytes

    def away(self, name):
        if name == file and self.uri.endswith("2"):
            raise StorageError("cannot read it") from OSError(5, "input/output error")
        return read(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "read_bytes", away)
        with pytest.raises(StorageError, match="cannot read it"):
            checkpoints.latest()
    assert checkpoints.latest()[0] == 2


@pytest.mark.parametrize("damage", [damage_marker, damage_meta_json])
def test_what_the_newest_complete_checkpoint_says_is_read_without_its_tensors(store, damage):
    checkpoints = Checkpoints(store)
    assert checkpoints.newest_meta() == {}
    checkpoints.save(1, state(1), {"seconds": 3.5})
    store.delete("checkpoint-00000001/state.safetensors")
    assert checkpoints.newest_meta() == {"seconds": 3.5}
    checkpoints.save(2, state(2), {"seconds": 9})
    damage(store.child("checkpoint-00000002"))
    assert checkpoints.newest_meta() == {"seconds": 3.5}


def test_pruning_keeps_complete_ones_and_clears_unfinished_ones(tmp_path):
    store = Store(tmp_path)
    checkpoints = Checkpoints(store, keep=2)
    checkpoints.save(1, state(1), {})
    store.write_bytes("checkpoint-00000002/state.safetensors", b"half")
    (tmp_path / "checkpoint-00000002" / ".meta.json.77.tmp").write_bytes(b"{")
    store.write_bytes("checkpoint-notes", b"not ours")
    checkpoints.save(3, state(3), {})
    assert store.names() == ["checkpoint-00000001", "checkpoint-00000003", "checkpoint-notes"]


def test_a_checkpoint_survives_a_kill_at_any_write(tmp_path):
    """The process dies before its n-th file is in place: the state before is still good."""
    code = """
import os, sys, torch
from stp_ray.artifacts import Checkpoints, Store
count, real = int(sys.argv[2]), os.replace
def replace(source, target):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), 9)
    real(source, target)
os.replace = replace
Checkpoints(Store(sys.argv[1])).save(2, {"weights": torch.ones(3)}, {"step": 2})
"""
    for writes in (0, 2, 3):
        folder = tmp_path / str(writes)
        Checkpoints(Store(folder)).save(1, state(1), {"step": 1})
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder), str(writes)], timeout=60, check=False
        )
        assert done.returncode == (0 if writes == 3 else -9)
        assert Checkpoints(Store(folder)).latest()[0] == (2 if writes == 3 else 1)


def test_at_least_one_checkpoint_is_kept(tmp_path):
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(Store(tmp_path), keep=0)
