"""Which stages are done."""

import json

import pytest

from stp_ray.artifacts import Manifest, Store
from stp_ray.errors import StorageError

pytestmark = pytest.mark.timeout(120)


def finish(manifest, stage, outputs):
    return manifest.finish(
        stage,
        inputs={"config": "demo"},
        outputs=outputs,
        seconds=2,
        device_seconds=4,
        metrics={"top1": 97.5},
    )


def test_a_finished_stage_is_done(store):
    manifest = Manifest(store)
    assert manifest.done("supernet") is None
    digest = store.write_bytes("supernet/model.safetensors", b"weights")
    record = finish(manifest, "supernet", {"supernet/model.safetensors": digest})
    finish(manifest, "finalize/0.15", {})
    again = Manifest(Store(store.uri))
    assert again.done("supernet") == record
    assert record["metrics"] == {"top1": 97.5}
    assert (record["seconds"], record["device_seconds"]) == (2.0, 4.0)
    assert record["finished"].endswith("+00:00")
    assert list(again.stages()) == ["supernet", "finalize/0.15"]


def test_a_stage_whose_output_was_lost_or_changed_is_not_done(store, caplog):
    manifest = Manifest(store)
    digest = store.write_bytes("a", b"a")
    finish(manifest, "explore", {"a": digest})
    store.write_bytes("a", b"b")
    assert manifest.done("explore") is None
    store.delete("a")
    assert manifest.done("explore") is None
    assert "explore runs again" in caplog.text


def test_a_stage_that_is_taken_back_is_not_done(store):
    manifest = Manifest(store)
    manifest.forget("supernet")
    finish(manifest, "supernet", {})
    finish(manifest, "explore", {})
    manifest.forget("supernet")
    assert manifest.done("supernet") is None
    assert list(Manifest(store).stages()) == ["explore"]


def test_a_driver_that_may_not_write_any_more_records_nothing(store):
    digest = store.write_bytes("a", b"a")
    finish(Manifest(store), "explore", {"a": digest})

    def refuse():
        raise StorageError("another driver has taken over")

    late, kept = Manifest(store, guard=refuse), store.read_bytes("manifest.json")
    store.write_bytes("a", b"b")
    for write in (
        lambda: finish(late, "supernet", {}),
        lambda: late.forget("explore"),
        lambda: late.rewritten("explore", "a"),
    ):
        with pytest.raises(StorageError, match="another driver"):
            write()
    assert store.read_bytes("manifest.json") == kept


def test_a_damaged_manifest_is_told(store):
    for content in (b"[]", b'{"stages": 1}', b"{"):
        store.write_bytes("manifest.json", content)
        with pytest.raises(StorageError, match=r"manifest\.json"):
            Manifest(store).done("supernet")


def test_a_manifest_is_plain_json(tmp_path):
    finish(Manifest(Store(tmp_path)), "supernet", {})
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert content["stages"]["supernet"]["inputs"] == {"config": "demo"}
