"""Where a run stands, from its folder alone."""

import json

import pytest

from stp_ray.artifacts import Manifest, Store
from stp_ray.config import dump_config, load_config, run_id
from stp_ray.errors import ConfigError, StorageError
from stp_ray.lease import Lease, held
from stp_ray.status import configuration, resumable, status

CONFIG = load_config({"name": "trial", "budgets": [0.5, 0.15]})


@pytest.fixture
def run(store):
    folder = store.child(run_id(CONFIG))
    folder.write_json("config.json", dump_config(CONFIG))
    return folder


def finish(run, *stages):
    for stage in stages:
        Manifest(run).finish(
            stage, inputs={}, outputs={}, seconds=3.0, device_seconds=6.0, metrics={"top1": 50.0}
        )


def test_a_run_that_has_just_begun(run):
    found = status(run)
    assert found.run == run_id(CONFIG)
    assert [stage.name for stage in found.stages] == [
        "supernet", "explore", "finalize/0.5", "finalize/0.15", "report",
    ]  # fmt: skip
    assert not found.finished
    assert found.state == "stopped; `stp resume` goes on"


def test_the_stage_under_way_tells_its_step(run):
    finish(run, "supernet")
    lines = [
        {"event": "start", "config": {"total_steps": 100}},
        {"event": "log", "step": 40, "metrics": {}},
        {"event": "start", "config": {"total_steps": 100}},
        {"event": "log", "step": 20, "metrics": {}},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"event": "lo'
    run.write_bytes("logs/explore.jsonl", text.encode())
    supernet, explore, *others = status(run).stages
    assert supernet.record["metrics"] == {"top1": 50.0}
    assert (explore.record, explore.step, explore.total_steps) == (None, 20, 100)
    assert all(stage.total_steps is None for stage in others)


def test_a_control_that_trains_is_shown_until_its_budget_is_done(run):
    finish(run, "supernet", "explore")
    lines = [{"event": "start", "config": {"total_steps": 80}}, {"event": "log", "step": 30}]
    text = "\n".join(map(json.dumps, lines)).encode()
    run.write_bytes("logs/control-0.15.jsonl", text)
    *_, smaller, control, report = status(run).stages
    assert [smaller.name, control.name, report.name] == ["finalize/0.15", "control/0.15", "report"]
    assert (control.record, control.step, control.total_steps) == (None, 30, 80)
    finish(run, "finalize/0.5", "finalize/0.15", "report")
    assert status(run).finished
    assert "control/0.15" not in [stage.name for stage in status(run).stages]


def test_a_log_that_was_cut_within_a_character_is_read(run):
    lines = [{"event": "start", "config": {"total_steps": 80}}, {"event": "log", "step": 30}]
    text = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    run.write_bytes("logs/supernet.jsonl", text + '{"event": "ü'.encode()[:-1])
    supernet = next(stage for stage in status(run).stages if stage.name == "supernet")
    assert (supernet.step, supernet.total_steps) == (30, 80)


def test_it_tells_who_drives(run):
    with held(run):
        assert status(run).state.startswith("driven by process ")
    assert status(run).state.startswith("stopped")


def test_a_driver_that_died_is_told(run, monkeypatch):
    Lease(run, duration=1.0)._renew()
    monkeypatch.setattr("stp_ray.status.DURATION", -1.0)
    assert "died" in status(run).state and "stp resume" in status(run).state


def test_a_finished_run(run):
    finish(run, "supernet", "explore", "finalize/0.5", "finalize/0.15", "report")
    assert (status(run).finished, status(run).state) == (True, "finished")


def test_the_configuration_comes_back_with_the_storage_that_the_run_lies_in(run):
    found = configuration(run)
    assert run_id(found) == run_id(CONFIG)
    assert f"{found.storage}/{run_id(found)}" == run.uri


def test_what_leaves_the_results_alone_can_be_set_anew(run):
    found = resumable(run, overrides=["cluster.address=10.0.0.1:6379", "tracking.wandb=off"])
    assert (found.cluster.address, found.tracking.wandb) == ("10.0.0.1:6379", "off")
    assert f"{found.storage}/{run_id(found)}" == run.uri
    for override in ("seed=7", "storage=elsewhere", "cluster.num_workers=4"):
        with pytest.raises(ConfigError, match=f"{override} would make another run of"):
            resumable(run, overrides=[override])


@pytest.mark.parametrize("storage", ["runs", "./runs/", "file:runs", "../{name}/runs"])
def test_the_same_storage_in_other_words_may_be_said(tmp_path, monkeypatch, storage):
    monkeypatch.chdir(tmp_path)
    folder = Store("runs").child(run_id(CONFIG))
    folder.write_json("config.json", dump_config(CONFIG))
    found = resumable(folder, overrides=[f"storage={storage.format(name=tmp_path.name)}"])
    assert Store(found.storage).child(run_id(found)) == folder
    with pytest.raises(ConfigError, match="would make another run"):
        resumable(folder, overrides=["storage=runs/deeper"])


def test_a_folder_that_is_no_run_is_told(store, run):
    with pytest.raises(StorageError, match=r"has no config\.json; expected the folder of a run"):
        status(store)
    run.write_json("config.json", {**dump_config(CONFIG), "seed": 7})
    with pytest.raises(StorageError, match="was renamed, or begun by another version"):
        configuration(run)
    run.write_json("config.json", [])
    with pytest.raises(StorageError, match="holds no settings"):
        configuration(run)
    run.write_json("config.json", {"nonsense": 1})
    with pytest.raises(StorageError, match="cannot be used"):
        configuration(run)
