"""The pipeline in one process: what it leaves, what it skips, what it makes again."""

import contextlib
import copy
import json
import math
import os
import shutil
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image
from typer.testing import CliRunner

import stp_ray as stp
from stp_ray import export
from stp_ray.artifacts import Checkpoints, Manifest, Store
from stp_ray.cli import app
from stp_ray.config import load_config, run_id
from stp_ray.data import describe, eval_batches, load
from stp_ray.data.split import derive_seed
from stp_ray.elastic import Budget, Subnet, importance
from stp_ray.errors import ConfigError, DataError, RunError
from stp_ray.lease import held
from stp_ray.method import Candidate, Teacher, evaluate, reference_logits, training
from stp_ray.models import build_model
from stp_ray.stages import explore as exploring
from stp_ray.stages import finalize as finalizing
from stp_ray.stages import images as stage_images
from stp_ray.stages import jobs, pipeline
from stp_ray.stages.images import share
from stp_ray.stages.network import build_supernet
from stp_ray.status import status
from tests.stages.runs import (
    ARTIFACTS,
    BOOKKEEPING,
    BUDGETS,
    WEIGHTS,
    files,
    in_process,
    kept,
    minimal,
    times,
)
from tests.tracking.records import Kept

pytestmark = pytest.mark.timeout(600)

BASELINE = {"baseline/model.safetensors", "baseline/metrics.parquet"}


class Run:
    """A finished run: its configuration, folder and summary, and the networks that it saved."""

    def __init__(self, storage: Path, content: dict) -> None:
        self.config = load_config({**content, "storage": str(storage)})
        self.folder = storage / run_id(self.config)
        self.saved: dict[str, torch.nn.Module] = {}

    def __call__(self) -> dict:
        self.summary = stp.run(self.config)
        return self.summary

    def copied(self, storage: Path) -> "Run":
        """The same run in another storage."""
        content = self.config.model_dump(mode="json") | {"storage": None}
        other = Run(storage, content | {"tracking": {"console": False, "wandb": "off"}})
        assert other.folder.name == self.folder.name
        shutil.copytree(self.folder, other.folder)
        return other


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    baseline = {"epochs": 1, "batch_size": 32, "lr": 0.05}
    content = in_process(baseline=baseline, tracking={"wandb": "offline"})
    run = Run(tmp_path_factory.mktemp("storage"), content)
    save = export.save_model

    def watched(store, module, description):
        run.saved[store.uri] = copy.deepcopy(module)
        return save(store, module, description)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "save_model", watched)
        patch.delenv("WANDB_DIR", raising=False)
        threads = torch.get_num_threads()
        run()
        torch.set_num_threads(threads)
    return run


# -- what is left ---------------------------------------------------------------------


def test_a_run_leaves_exactly_its_artifacts(finished):
    left = files(finished.folder)
    expected = ARTIFACTS | BOOKKEEPING | BASELINE | {"baseline/result.json", "logs/baseline.jsonl"}
    assert kept(left) == expected
    checkpoints = {Path(name).parent for name in left if "/checkpoint-" in name}
    assert {str(path.parent) for path in checkpoints} == {"supernet", "baseline"}
    assert any(name.startswith("explore/parts/") for name in left)
    assert set(os.listdir(finished.folder.parent)) == {finished.folder.name, "latest"}
    assert (finished.folder.parent / "latest").resolve() == finished.folder.resolve()


def test_the_summary_has_exactly_the_keys_that_scripts_read(finished):
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert summary == finished.summary
    assert f"pruned, {BUDGETS[0]}" in finished.summary._repr_html_()
    assert set(summary) == {
        "run_id", "storage", "dense_top1", "main_top1", "macs", "params", "budgets", "seconds",
    }  # fmt: skip
    assert set(summary["budgets"]) == set(BUDGETS)
    for label, budget in summary["budgets"].items():
        assert set(budget) == {
            "top1", "retention_dense", "retention_main", "macs", "params", "latency_ms",
            "dense_latency_ms", "subnet_id", "uri",
        }  # fmt: skip
        assert budget["uri"] == f"file://{finished.folder}/budget-{label}"
        assert budget["retention_dense"] == 100 * budget["top1"] / summary["dense_top1"]
        assert budget["retention_main"] == 100 * budget["top1"] / summary["main_top1"]
        assert budget["latency_ms"] > 0 and budget["dense_latency_ms"] > 0
        assert 0 < budget["params"] < summary["params"]
    assert summary["run_id"] == finished.folder.name
    assert 0 <= summary["dense_top1"] <= 100 and 0 <= summary["main_top1"] <= 100
    assert summary["seconds"] > 0


def test_devices_are_counted_once_where_budgets_wait_for_each_other(finished):
    stages = Manifest(Store(finished.folder)).stages()
    records = [stages[f"finalize/{label}"] for label in BUDGETS]
    devices = finished.config.cluster.threads_per_worker
    held, wall = sum(r["device_seconds"] for r in records), max(r["seconds"] for r in records)
    assert 0.8 * wall * devices < held <= wall * devices
    assert all(r["device_seconds"] > 0 for r in records)


def test_predictions_are_those_of_the_dense_and_the_pruned_network(finished):
    for label, budget in finished.summary["budgets"].items():
        table = Store(finished.folder).read_table(f"budget-{label}/predictions.parquet")
        rows = table.to_pylist()
        assert len(rows) == 360
        assert json.loads(table.schema.metadata[b"class_names"]) == [str(i) for i in range(10)]
        for column, top1 in (("before", finished.summary["dense_top1"]), ("after", budget["top1"])):
            right = sum(row[column] == row["label"] for row in rows)
            assert 100 * right / len(rows) == pytest.approx(top1)
        shown = [row for row in rows if row["image"] is not None]
        assert all((r["before"] == r["label"]) != (r["after"] == r["label"]) for r in shown)
        for side in ("before", "after"):
            of_one_side = [row for row in shown if row[side] == row["label"]]
            assert len(of_one_side) <= 12
        assert shown and all(row["image"].startswith(b"\x89PNG") for row in shown)


def test_every_network_keeps_its_budget(finished):
    config = finished.config
    net = build_supernet(config, describe(config.data))
    front = json.loads((finished.folder / "explore/front.json").read_text())
    assert finished.summary["macs"] == net.cost().macs
    for label, budget in finished.summary["budgets"].items():
        text = (finished.folder / f"budget-{label}" / "subnet.json").read_text()
        subnet = Subnet.from_json(text)
        assert subnet.to_json() == front["budgets"][label]
        assert subnet.id == budget["subnet_id"]
        cost = net.cost(subnet)
        assert (cost.macs, cost.params) == (budget["macs"], budget["params"])
        assert Budget(macs=float(label)).admits(cost, of=net.cost())


def test_a_network_that_is_loaded_is_the_one_that_was_saved(finished):
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = load(finished.config.data)
    for budget in finished.summary["budgets"].values():
        loaded, saved = stp.load(budget["uri"]), finished.saved[budget["uri"]].eval()
        with torch.no_grad():
            assert torch.equal(loaded(images), saved(images))
        test = eval_batches(data.test, finished.config.data, 512, torch.device("cpu"))
        assert evaluate(loaded, test)["top1"] == budget["top1"]
        assert sum(p.numel() for p in loaded.parameters()) == budget["params"]


def test_the_manifest_names_what_each_stage_made_and_from_what(finished):
    store = Store(finished.folder)
    manifest = Manifest(store)
    stages = manifest.stages()
    budgets = [f"finalize/{label}" for label in BUDGETS]
    assert list(stages) == ["baseline", "supernet", "explore", *budgets, "report"]
    assert all(manifest.done(stage) for stage in stages)
    assert stages["explore"]["inputs"]["supernet"] == stages["supernet"]["outputs"]
    for stage in budgets:
        assert set(stages[stage]["inputs"]) == {"supernet", "explore"}
        assert set(stages[stage]["outputs"]) > {
            f"{stage.replace('finalize/', 'budget-')}/pruned.json"
        }
    made = {name for record in stages.values() for name in record["outputs"]}
    documents = {"config.json", "environment.json", "inputs.json", "manifest.json"}
    assert ARTIFACTS - documents - made == {f"budget-{label}/README.md" for label in BUDGETS}


def test_people_find_what_they_need(finished):
    page = (finished.folder / "report.html").read_text()
    assert finished.folder.name in page
    assert json.loads((finished.folder / "config.json").read_text())["name"] == "tiny"
    assert "torch" in json.loads((finished.folder / "environment.json").read_text())["packages"]
    for budget in finished.summary["budgets"].values():
        card = Path(budget["uri"].removeprefix("file://"), "README.md").read_text()
        assert f'stp_ray.load("{budget["uri"]}")' in card
        told = "trained for 1 epochs; the weights of the pruned one have seen 6."
        assert told in card and told in page
        assert "on a CPU, threads: 1." in card
    assert "that finished the run, threads: 1." in page


@pytest.mark.parametrize(("wanted", "there", "used"), [(4, 8, 4), (8, 2, 2)])
def test_latency_is_measured_with_threads_that_the_machine_has(monkeypatch, wanted, there, used):
    monkeypatch.setattr(pipeline.os, "cpu_count", lambda: there)
    config = load_config({"cluster": {"threads_per_worker": wanted}})
    assert pipeline.latency_threads(config) == used


def test_a_description_says_how_images_are_brought_to_size(tmp_path):
    sizes = {"image_size": 14, "random_resized_crop": True, "crop_padding": 0}
    run = Run(tmp_path, minimal(data=sizes))
    run()
    told = json.loads((run.folder / "budget-0.5/model.json").read_text())
    assert (told["image_size"], told["resize"]) == (14, 16)
    assert "brought to 16 px" in (run.folder / "budget-0.5/README.md").read_text()


def test_a_search_is_as_long_as_it_was_said_to_be(finished):
    lines = (finished.folder / "logs/explore.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    (start,) = [event for event in events if event["event"] == "start"]
    steps = [event["step"] for event in events if event["event"] == "log"]
    assert steps == [1, 2, 3, 4]  # three generations and the finalists
    assert start["config"]["total_steps"] == steps[-1]


def test_every_candidate_is_in_the_table_once(finished):
    rows = Store(finished.folder).read_table("explore/candidates.parquet").to_pylist()
    assert len({(row["subnet_id"], row["images"], row["steps"]) for row in rows}) == len(rows)
    options = finished.config.explore
    first = [row for row in rows if row["images"]]
    assert len(first) == options.generations * options.population
    assert {row["generation"] for row in rows} == set(range(options.generations + 1))
    finalists = [row for row in rows if row["generation"] == options.generations]
    assert {row["steps"] for row in finalists} == {options.final_steps}
    assert options.finalists <= len(finalists) <= len(BUDGETS) * options.finalists


# -- what wandb keeps -------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked(finished):
    """Stage -> what was kept of it, as after `stp run` with `tracking.wandb=offline`."""
    files = (finished.folder / "wandb").glob("offline-run-*/*.wandb")
    return {kept.run.display_name: kept for kept in map(Kept, files)}


def test_wandb_keeps_metrics_and_summary_of_every_stage(finished, tracked):
    budgets = [f"finalize/{label}" for label in BUDGETS]
    assert set(tracked) == {"baseline", "supernet", "explore", *budgets, "report"}
    assert {kept.run.run_group for kept in tracked.values()} == {finished.folder.name}
    for stage in ("baseline", "supernet", *budgets):
        kept, kind = tracked[stage], stage.partition("/")[0]
        epochs = kept.column(f"{kind}/epoch")
        assert epochs == list(range(1, len(epochs) + 1)) and epochs
        assert len(kept.column(f"{kind}/loss")) == len(kept.column(f"{kind}/step"))
        assert kept.axes[f"{kind}/*"] == f"{kind}/step"
        assert "memory_percent" in kept.stats
    generations = tracked["explore"].column("explore/generation")
    assert generations[:4] == [1, 2, 3, 4]  # three and the finalists
    assert len(tracked["explore"].column("explore/best/0.15")) == 4
    assert tracked["explore"].axes["explore/*"] == "explore/generation"
    summary = finished.summary
    assert tracked["supernet"].summary["top1"] == summary["main_top1"]
    assert tracked["supernet"].summary["macs"] == summary["macs"]
    for label in BUDGETS:
        kept, budget = tracked[f"finalize/{label}"], summary["budgets"][label]
        for name in ("top1", "macs", "params"):
            assert kept.summary[name] == budget[name]


def test_wandb_keeps_every_candidate_and_every_budget_as_tables(finished, tracked):
    rows = Store(finished.folder).read_table("explore/candidates.parquet").to_pylist()
    table = tracked["explore"].table("explore/scored")
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == [
        {name: value for name, value in row.items() if name != "subnet"} for row in rows
    ]
    (plot,) = tracked["explore"].column("explore/scored_plot_table")
    assert plot["nrows"] == len(rows)
    table = tracked["report"].table("report/budgets")
    found = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert {row.pop("budget"): row for row in found} == finished.summary["budgets"]


def test_wandb_keeps_the_pictures_of_the_architecture_and_the_accuracy(finished, tracked):
    for name in ("architecture", "accuracy"):
        (picture,) = tracked["report"].column(f"report/{name}")
        with Image.open(tracked["report"].folder / "files" / picture["path"]) as image:
            assert image.width > 500 and image.height > 300
            assert len(image.convert("RGB").getcolors(1 << 20)) > 10, "something is drawn"


def test_wandb_keeps_lineage_by_reference_and_no_weights(finished, tracked):
    lineage = {}
    for stage, left in tracked.items():
        for name, kind, used, references in left.artifacts:
            if kind == "run_table":
                continue
            lineage.setdefault(stage, ([], []))[0 if used else 1].append(
                name.removeprefix(f"{finished.folder.name}-")
            )
            for uri in references.values():
                assert Path(uri.removeprefix(f"file://{finished.folder}/")).parts[0] != "wandb"
                assert (finished.folder / uri.removeprefix(f"file://{finished.folder}/")).is_file()
            if stage == "finalize/0.5" and not used:
                assert {"model.safetensors", "subnet.json"} <= set(references)
    exports = [f"export-{label}" for label in BUDGETS]
    assert lineage == {
        "baseline": ([], ["baseline"]),
        "supernet": ([], ["supernet"]),
        "explore": (["supernet"], ["subnet"]),
        **{f"finalize/{b}": (["supernet", "subnet"], [f"export-{b}"]) for b in BUDGETS},
        "report": (["subnet", *exports], ["report"]),
    }
    copies = [path for path in (finished.folder / "wandb").rglob("*") if "safetensors" in path.name]
    assert copies == []


# -- what is skipped and what is made again ---------------------------------------------


def test_a_second_call_does_nothing(finished, tmp_path, monkeypatch):
    run = finished.copied(tmp_path)
    before = times(run.folder)
    monkeypatch.setattr(pipeline, "share", lambda *args, **kwargs: pytest.fail("loads images"))
    assert run() == finished.summary
    assert times(run.folder) == before


def test_only_the_report_is_missing(finished, tmp_path, monkeypatch):
    run = finished.copied(tmp_path)
    (run.folder / "report.html").unlink()
    before = times(run.folder, kept(files(run.folder)))
    monkeypatch.setattr(pipeline, "share", lambda *args, **kwargs: pytest.fail("loads images"))
    run()
    assert (run.folder / "report.html").exists()
    changed = {name for name, time in before.items() if times(run.folder, [name])[name] != time}
    cards = {f"budget-{label}/README.md" for label in BUDGETS}
    documents = {"config.json", "environment.json", "inputs.json", "manifest.json", "summary.json"}
    documents.add("logs/report.jsonl")
    assert changed <= cards | documents
    assert "manifest.json" in changed


def test_a_folder_in_the_place_of_the_link_to_the_latest_run_ends_none(finished, tmp_path, caplog):
    """As copying a run's storage may leave it."""
    run = finished.copied(tmp_path)
    latest = run.folder.parent / "latest"
    latest.unlink(missing_ok=True)
    (latest / "kept").mkdir(parents=True)
    (run.folder / "report.html").unlink()
    run()
    assert (run.folder / "report.html").exists()
    assert (latest / "kept").is_dir()
    assert "does not point to this run" in caplog.text
    assert not list(run.folder.parent.glob(".latest-*"))


@pytest.mark.parametrize(
    "lost", ["supernet/model.safetensors", "budget-0.5/model.safetensors", "explore/front.json"]
)
def test_a_lost_output_is_made_again_to_the_bit(finished, tmp_path, monkeypatch, lost):
    run = finished.copied(tmp_path)
    path = run.folder / lost
    wanted = path.read_bytes()
    path.unlink() if lost.startswith("supernet") else path.write_bytes(wanted[:-9])
    others = set(WEIGHTS) - {lost}
    before = times(run.folder, others)
    seen = []  # by somebody who asks meanwhile
    for name in ("fit", "explore", "finalize"):
        made = getattr(pipeline, name)

        def watched(*given, _made=made):
            seen.append(status(Store(run.folder)).finished)
            return _made(*given)

        monkeypatch.setattr(pipeline, name, watched)
    run()
    assert seen == [False]
    assert path.read_bytes() == wanted
    assert times(run.folder, others) == before


def test_a_budget_whose_shape_is_another_is_pruned_anew(finished, tmp_path, caplog):
    """As a search that had to be made again on another machine may have it."""
    run = finished.copied(tmp_path)
    store = Store(run.folder)
    front = store.read_json("explore/front.json")
    other = build_supernet(run.config, describe(run.config.data)).space.smallest
    front["budgets"]["0.5"] = other.to_json()
    store.write_json("explore/front.json", front)
    manifest = store.read_json("manifest.json")
    found = manifest["stages"]["explore"]["outputs"]
    found["explore/front.json"] = store.checksum("explore/front.json")
    store.write_json("manifest.json", manifest)
    store.delete("report.html")
    rest = [name for name in WEIGHTS if "0.5" not in name]
    before = times(run.folder, rest)
    summary = run()
    assert summary["budgets"]["0.5"]["subnet_id"] == other.id
    assert "budget 0.5 has another shape than before" in caplog.text
    assert stp.load(str(run.folder / "budget-0.5")) is not None
    assert times(run.folder, rest) == before


def test_a_report_that_is_written_again_leaves_its_run_finished(finished, tmp_path):
    run = finished.copied(tmp_path)
    page = (run.folder / "report.html").read_bytes()
    done = CliRunner().invoke(app, ["report", str(run.folder)])
    assert done.exit_code == 0, done.output
    assert (run.folder / "report.html").read_bytes() == page
    (run.folder / "report.html").write_bytes(b"of an earlier version")
    assert CliRunner().invoke(app, ["report", str(run.folder)]).exit_code == 0
    before = times(run.folder)
    run()
    assert times(run.folder) == before


def test_a_run_can_stop_after_a_stage_and_go_on(tmp_path):
    run = Run(tmp_path, minimal())
    figures = pipeline.run(run.config, until="supernet")
    assert set(figures) == {"supernet"}
    assert not (run.folder / "explore").exists()
    before = times(run.folder / "supernet")
    figures = pipeline.run(run.config, until="explore")
    assert set(figures) == {"supernet", "explore"}
    assert not (run.folder / "budget-0.5").exists()
    assert set(run()["budgets"]) == {"0.5"}
    assert times(run.folder / "supernet") == before


def test_a_finished_run_has_the_figures_of_its_stages_too(finished):
    figures = pipeline.run(finished.config, until="explore")
    assert {"supernet", "explore"} <= set(figures) and "budgets" not in figures


def test_a_run_that_ends_early_needs_no_workers_for_what_comes_after():
    config = load_config(minimal(cluster={"num_workers": 2}, finalize={"num_workers": 4}))
    assert pipeline._workers(config, [], "supernet") == 2
    assert pipeline._workers(config, [], None) == 4
    assert pipeline._workers(config, ["supernet"], "explore") == 1


def test_the_control_is_the_same_shape_from_scratch_for_as_long(tmp_path):
    run = Run(tmp_path, minimal(finalize={"control": True}))
    budget = run()["budgets"]["0.5"]
    home = Store(run.folder / "budget-0.5")
    assert budget["control_top1"] == home.read_json("control/result.json")["metrics"]["top1"]
    control = home.load_tensors("control/model.safetensors")
    pruned = home.load_tensors("model.safetensors")
    assert {n: t.shape for n, t in control.items()} == {n: t.shape for n, t in pruned.items()}
    assert home.read_table("control/metrics.parquet").column("epoch").to_pylist() == [1, 2]


def test_the_ladder_sees_other_epochs_than_the_supernet(tmp_path, monkeypatch):
    seen, batches = [], stage_images.train_batches

    def watched(*arguments, seed, epoch, **options):
        if seed == derive_seed("data", 0):  # else to calibrate
            seen.append(epoch)
        return batches(*arguments, seed=seed, epoch=epoch, **options)

    monkeypatch.setattr(stage_images, "train_batches", watched)
    epochs = {"optimisation": {"epochs": 2}}
    Run(tmp_path, minimal(supernet=epochs, finalize={**epochs, "control": True}))()
    supernet, ladder, control = [0, 1], [2, 3], [0, 1, 2, 3]
    assert seen == [*supernet, *ladder, *control]


def vit(num_classes):
    return torchvision.models.VisionTransformer(8, 4, 2, 4, 64, 128, num_classes=num_classes)


def test_a_network_of_which_modules_stayed_whole_is_loaded_again(tmp_path):
    run = Run(tmp_path, minimal(space={"ignore": ["layer3"]}))
    summary = run()
    for budget in summary["budgets"].values():
        assert sum(p.numel() for p in stp.load(budget["uri"]).parameters()) == budget["params"]


def test_only_a_stage_is_a_place_to_stop(tmp_path):
    with pytest.raises(ConfigError, match="until is 'supernett'; expected baseline, supernet"):
        stp.run(minimal(storage=str(tmp_path)), until="supernett")
    assert not any(tmp_path.iterdir())


def test_the_control_starts_without_the_weights_that_were_given(tmp_path, monkeypatch):
    given = {name: torch.full_like(t, 0.5) for name, t in vit(10).state_dict().items()}
    safetensors.torch.save_file(given, tmp_path / "given.safetensors")
    model = {"name": f"{__name__}:vit", "weights": str(tmp_path / "given.safetensors")}
    started = {}

    class Watched(jobs.DenseObjective):
        def __init__(self, network, smoothing):
            super().__init__(network, smoothing)
            started.update({name: p.detach().clone() for name, p in network.named_parameters()})

    monkeypatch.setattr(jobs, "DenseObjective", Watched)
    data = {"crop_padding": 0}
    Run(tmp_path, minimal(model=model, data=data, finalize={"control": True}))()
    assert {"class_token", "encoder.pos_embedding"} < set(started)
    assert [name for name, tensor in started.items() if (tensor == 0.5).all()] == []


@pytest.fixture
def heard(monkeypatch):
    """The teachers of a run, in order; each counts the steps that it was asked in."""
    taught = []

    class Heard(Teacher):
        def __init__(self, network, weight):
            super().__init__(network, weight)
            self.steps = 0
            taught.append(self)

        def __call__(self, images, labels):
            self.steps += 1
            return super().__call__(images, labels)

    monkeypatch.setattr(jobs, "Teacher", Heard)
    return taught


TAUGHT = {"baseline": {"epochs": 1, "batch_size": 32, "lr": 0.05}, "teacher_weight": 0.25}


def test_the_trained_baseline_has_a_say_in_the_labels_of_all_that_come_after_it(tmp_path, heard):
    run = Run(tmp_path, minimal(**TAUGHT, finalize={"control": True}))
    run()
    store = Store(run.folder)
    dense = store.load_tensors("baseline/model.safetensors")
    supernet, ladder, control = heard
    assert supernet.steps == ladder.steps == 3 and control.steps == 6
    for teacher in heard:
        assert teacher.weight == 0.25
        weights = teacher.network.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in dense.items())
    stages = Manifest(store).stages()
    for stage in ("supernet", "finalize/0.5"):
        assert stages[stage]["inputs"]["baseline"] == stages["baseline"]["outputs"]


def test_the_last_stage_can_do_without_the_baselines_say(tmp_path, heard):
    run = Run(tmp_path, minimal(**TAUGHT, finalize={"taught": False}))
    run()
    assert [teacher.steps for teacher in heard] == [3], "in the supernet alone"
    stages = Manifest(Store(run.folder)).stages()
    assert "baseline" in stages["supernet"]["inputs"]
    assert "baseline" not in stages["finalize/0.5"]["inputs"]


def test_a_supernet_can_start_as_the_trained_baseline(tmp_path, monkeypatch):
    untaught = {**TAUGHT, "teacher_weight": 0}  # so that it has no other reason to name it
    run = Run(tmp_path, minimal(**untaught, supernet={"from_baseline": True}))
    started = {}

    class Watched(jobs.StimulativeObjective):
        def __init__(self, net, *options):
            super().__init__(net, *options)
            started["net"] = copy.deepcopy(net)

    monkeypatch.setattr(jobs, "StimulativeObjective", Watched)
    run()
    store = Store(run.folder)
    dense = build_supernet(run.config, describe(run.config.data))
    dense.model.load_state_dict(store.load_tensors("baseline/model.safetensors"))
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (net.eval()(images) for net in (started["net"], dense))
    torch.testing.assert_close(found, expected)
    for scores in importance(started["net"]).values():
        assert torch.equal(scores, scores.sort(descending=True).values)
    stages = Manifest(store).stages()
    assert stages["supernet"]["inputs"]["baseline"] == stages["baseline"]["outputs"]


def given(weights):
    """A recipe whose baseline is a network that there is, as it is."""
    recipe = {**TAUGHT, "baseline": {"epochs": 0}, "model": {"weights": str(weights)}}
    return minimal(**recipe, data={"limit": 320})


def test_weights_that_were_given_teach_as_they_are(finished, tmp_path, heard):
    run = Run(tmp_path, given(finished.folder / "supernet/model.safetensors"))
    run()
    assert run.summary["dense_top1"] == finished.summary["main_top1"]
    dense = build_supernet(run.config, describe(run.config.data)).model.eval()
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for teacher in heard:
            torch.testing.assert_close(teacher.network(images), dense(images))
    assert [teacher.steps for teacher in heard] == [9, 9], "in the supernet and the ladder"
    assert not (run.folder / "baseline/metrics.parquet").exists(), "there is no curve"
    assert "has the weights that were given" in (run.folder / "budget-0.5/README.md").read_text()


def test_weights_that_know_nothing_of_the_data_do_not_teach(tmp_path):
    network = build_model("resnet20", num_classes=10)
    torch.nn.init.zeros_(network.fc.weight)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "guess.safetensors")
    run = Run(tmp_path / "runs", given(tmp_path / "guess.safetensors"))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"of the test images right, and a guess 10\.0 %;"):
            run()
    assert not (run.folder / "supernet").exists()


# -- a training that goes on ---------------------------------------------------------------


@pytest.fixture
def interrupted(monkeypatch):
    """Starts a run, which is interrupted after so many steps of a training."""
    advance = training.Trainer._advance

    def start(run, done, until="supernet"):
        def stops(trainer, *arguments):
            if trainer.step == done:
                raise KeyboardInterrupt
            return advance(trainer, *arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training.Trainer, "_advance", stops)
            pipeline.run(run.config, until=until)

    return start


EVERY_STEP = {"optimisation": {"checkpoint_every": 1, "epochs": 2}}


def test_an_epoch_that_is_resumed_has_the_losses_of_all_its_steps(tmp_path, interrupted):
    run, calm = (Run(tmp_path / name, minimal(supernet=EVERY_STEP)) for name in "ab")
    interrupted(run, 2)
    for each in (run, calm):
        pipeline.run(each.config, until="supernet")
    metrics = [Store(each.folder).read_table("supernet/metrics.parquet") for each in (run, calm)]
    assert metrics[0].column("step").to_pylist() == [3, 6]
    assert metrics[0].to_pylist() == metrics[1].to_pylist()


def test_workers_compare_the_steps_that_they_go_on_from(tmp_path, interrupted, monkeypatch):
    run, compared = Run(tmp_path, minimal(supernet=EVERY_STEP)), []
    interrupted(run, 2)
    monkeypatch.setattr(jobs.Place, "require_same_step", lambda _, step: compared.append(step))
    pipeline.run(run.config, until="supernet")
    assert compared == [2]


def test_a_checkpoint_without_the_losses_so_far_goes_on(tmp_path, interrupted):
    """As an earlier version wrote it."""
    run = Run(tmp_path, minimal(supernet=EVERY_STEP))
    interrupted(run, 2)
    checkpoints = Checkpoints(Store(run.folder).child("supernet"))
    step, tensors, meta = checkpoints.latest()
    del meta["means"], meta["seconds"], meta["images"]
    checkpoints.save(step, tensors, meta)
    pipeline.run(run.config, until="supernet")
    rows = Store(run.folder).read_table("supernet/metrics.parquet").to_pylist()
    assert [row["step"] for row in rows] == [3, 6]
    assert all(row["loss"] > 0 for row in rows)


def test_a_training_does_not_go_on_with_fewer_images(tmp_path, interrupted):
    """They would come in another order."""
    run = Run(tmp_path, minimal(supernet=EVERY_STEP))
    interrupted(run, 2)
    checkpoints = Checkpoints(Store(run.folder).child("supernet"))
    step, tensors, meta = checkpoints.latest()
    assert meta["images"] == 128 - 32
    checkpoints.save(step, tensors, {**meta, "images": 97})
    with pytest.raises(DataError, match="was trained on 97 images, and 96 can be read"):
        pipeline.run(run.config, until="supernet")


@pytest.fixture
def slow(monkeypatch):
    """In a block of it what a module times takes 100,000 times as long."""

    @contextlib.contextmanager
    def block(module):
        with monkeypatch.context() as patch:
            clock = SimpleNamespace(monotonic=lambda: 1e5 * time.monotonic())
            patch.setattr(module, "time", clock)
            yield

    return block


def resumed(run, stage, until):
    """What is recorded of a stage once the run has gone on, and the seconds that this took."""
    began = time.monotonic()
    pipeline.run(run.config, until=until)
    took = time.monotonic() - began
    return Manifest(Store(run.folder)).stages()[stage], took


def test_a_stage_that_is_resumed_counts_the_seconds_of_its_checkpoint(tmp_path, interrupted, slow):
    run = Run(tmp_path, minimal(supernet=EVERY_STEP))
    with slow(jobs):
        interrupted(run, 4)
    spent = jobs.seconds_spent(Store(run.folder).child("supernet"))
    assert spent > 600
    record, took = resumed(run, "supernet", until="supernet")
    assert spent < record["seconds"] < spent + took
    assert record["device_seconds"] == record["seconds"] * run.config.cluster.threads_per_worker
    trained = Store(run.folder).read_json("supernet/result.json")["seconds"]
    assert spent < trained < record["seconds"]


def test_a_budget_that_is_resumed_counts_those_of_ladder_and_control(tmp_path, interrupted, slow):
    run = Run(tmp_path, minimal(finalize={"control": True}))
    pipeline.run(run.config, until="explore")
    with slow(jobs):
        interrupted(run, 4, until=None)  # the ladder has three
    home = Store(run.folder).child("budget-0.5")
    ladder, control = jobs.seconds_spent(home), jobs.seconds_spent(home.child("control"))
    assert min(ladder, control) > 600
    record, took = resumed(run, "finalize/0.5", until=None)
    for seconds in (record["seconds"], record["device_seconds"]):
        assert ladder + control < seconds < ladder + control + took


def test_a_run_that_goes_on_after_a_budget_counts_its_seconds(tmp_path, monkeypatch, slow):
    """In one process the second budget waits for the first."""
    run, prune = Run(tmp_path, minimal(budgets=[0.6, 0.3])), finalizing.prune

    def first_alone(job, *arguments):
        if job.stage == "finalize/0.3":
            raise KeyboardInterrupt
        return prune(job, *arguments)

    with slow(pipeline), monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finalizing, "prune", first_alone)
        pipeline.run(run.config)
    first = Manifest(Store(run.folder)).stages()["finalize/0.6"]["seconds"]
    trained = jobs.seconds_spent(Store(run.folder).child("budget-0.3"))
    assert first > 600 and trained > 0
    record, took = resumed(run, "finalize/0.3", until=None)
    assert first + trained < record["seconds"] < first + trained + took


def test_a_run_that_goes_on_within_a_budget_counts_its_seconds_for_the_next(
    tmp_path, interrupted, slow
):
    run = Run(tmp_path, minimal(budgets=[0.6, 0.3], finalize=EVERY_STEP))
    pipeline.run(run.config, until="explore")
    with slow(jobs):
        interrupted(run, 2, until=None)
    spent = jobs.seconds_spent(Store(run.folder).child("budget-0.6"))
    assert spent > 600
    assert jobs.seconds_spent(Store(run.folder).child("budget-0.3")) == 0
    record, took = resumed(run, "finalize/0.3", until=None)
    assert spent < record["seconds"] < spent + took


@pytest.fixture
def half_searched(tmp_path, asked, slow):
    """A run that stopped with two of its three candidates scored, and the keys of those asked."""
    seen, stop_at = asked
    run = Run(tmp_path, minimal())
    pipeline.run(run.config, until="supernet")
    stop_at.append(2)
    with slow(exploring), pytest.raises(KeyboardInterrupt):
        pipeline.run(run.config, until="explore")
    stop_at.clear()
    return run, seen


def test_a_search_that_is_resumed_counts_the_seconds_of_its_scores(half_searched):
    run, _ = half_searched
    spent = exploring.seconds_searched(Store(run.folder))
    assert spent > 600
    record, took = resumed(run, "explore", until="explore")
    assert spent < record["seconds"] < spent + took
    assert spent < exploring.seconds_searched(Store(run.folder)) < record["seconds"]


def test_scores_without_seconds_go_on(half_searched):
    """As an earlier version wrote them."""
    run, seen = half_searched
    parts = Store(run.folder).child("explore", "parts")
    for name in parts.names():
        parts.write_table(name, parts.read_table(name).drop_columns(["seconds"]).to_pylist())
    assert exploring.seconds_searched(Store(run.folder)) == 0
    pipeline.run(run.config, until="explore")
    assert len(seen) == len(set(seen)) == 3


# -- two drivers -------------------------------------------------------------------------


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path):
    run = Run(tmp_path, minimal())
    with (
        held(Store(run.folder), duration=2.0),
        pytest.raises(RunError, match=r"is being driven by process \d+ on .* the same command"),
    ):
        run()
    assert set(Store(run.folder).names()) == {"lease"}, "nothing was begun"


# -- a loss that is not finite ------------------------------------------------------------


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    content = minimal(data={"limit": 160}, supernet={"optimisation": {"checkpoint_every": 2}})
    run, calm = Run(tmp_path / "a", content), Run(tmp_path / "b", content)
    rate = training.learning_rate

    def explodes(options, step, total_steps):
        return rate(options, step, total_steps) if step < 2 else math.nan

    with monkeypatch.context() as patch:
        patch.setattr(training, "learning_rate", explodes)
        with pytest.raises(RunError, match=r"not finite.*the last checkpoint is kept") as stopped:
            pipeline.run(run.config, until="supernet")
    assert stopped.value.exit_code == 1
    assert not (run.folder / "supernet/result.json").exists()
    assert "supernet" not in Manifest(Store(run.folder)).stages()
    checkpoints = {n for n in files(run.folder) if n.endswith("complete.json")}
    assert checkpoints == {"supernet/checkpoint-00000002/complete.json"}
    # The same command goes on from it, as if nothing had been.
    pipeline.run(run.config, until="supernet")
    pipeline.run(calm.config, until="supernet")
    assert run.folder.name == calm.folder.name
    weights = [(r.folder / "supernet/model.safetensors").read_bytes() for r in (run, calm)]
    assert weights[0] == weights[1]


def test_a_notice_keeps_no_weights_that_are_not_finite(tmp_path, monkeypatch):
    """A GPU is asked for its losses every 50 steps alone, and a machine may go in between."""
    optimisation = {"lr": 1e30, "warmup_epochs": 0, "batch_size": 8, "checkpoint_every": 0}
    run = Run(tmp_path, minimal(supernet={"optimisation": optimisation}))
    notices = iter([False] * 3 + [True])
    monkeypatch.setattr(jobs.Notices, "taken", lambda self: next(notices, False))
    monkeypatch.setattr(jobs, "Trainer", partial(jobs.Trainer, check_every=50))
    with pytest.raises(RunError, match="not finite"):
        pipeline.run(run.config, until="supernet")
    assert next(notices, None) is None, "the notice came"
    assert Checkpoints(Store(run.folder / "supernet")).latest() is None


# -- exploration --------------------------------------------------------------------------


class Exploration:
    """The exploration of a finished run, in a folder of its own."""

    def __init__(self, finished: Run, folder: Path, **cluster) -> None:
        content = finished.config.model_dump(mode="json")
        content["cluster"] |= cluster
        self.config = load_config(content)
        self.store = Store(folder)
        shutil.copytree(finished.folder / "supernet", folder / "supernet")
        (folder / "config.json").write_text("{}")
        self.summary = describe(self.config.data)

    def __call__(self) -> dict:
        net = build_supernet(self.config, self.summary)
        local = self.config.cluster.in_process
        images = share(self.config.data, self.summary, in_process=local)
        return exploring.explore(self.config, self.store, net, images, Silent())

    def outcome(self) -> tuple[list, dict]:
        """The scored candidates in order, and the front."""
        rows = self.store.read_table("explore/candidates.parquet").to_pylist()
        return rows, self.store.read_json("explore/front.json")


class Silent:
    def log(self, metrics, step):
        pass


@pytest.fixture
def asked(monkeypatch):
    """Keys of the candidates that were scored in this process, in order; None in it stops."""
    seen: list[str] = []
    score = exploring.Scorer.__call__
    stop_at: list[int] = []

    def counted(self, subnet, images, steps):
        if stop_at and len(seen) == stop_at[0]:
            raise KeyboardInterrupt
        seen.append(Candidate(subnet, images, 0, 0, steps).key)
        return score(self, subnet, images, steps)

    monkeypatch.setattr(exploring.Scorer, "__call__", counted)
    return seen, stop_at


def test_no_candidate_is_scored_twice(finished, tmp_path, asked):
    seen, stop_at = asked
    whole = Exploration(finished, tmp_path / "whole")
    whole()
    assert len(seen) == len(set(seen)) == len(whole.outcome()[0])
    rows = whole.outcome()[0]
    assert set(seen) == {
        Candidate(Subnet.from_json(row["subnet"]), row["images"], 0, 0, row["steps"]).key
        for row in rows
    }
    assert {row["steps"] for row in rows} == {0, 3, 6}
    # Stopped within a generation, it goes on with what is not known, and finds the same.
    every = set(seen)
    stopped = Exploration(finished, tmp_path / "stopped")
    seen.clear()
    stop_at.append(13)
    with pytest.raises(KeyboardInterrupt):
        stopped()
    parts = stopped.store.child("explore", "parts")
    known = {row["key"] for name in parts.names() for row in parts.read_table(name).to_pylist()}
    assert len(known) == 12
    stop_at.clear()
    seen.clear()
    stopped()
    assert set(seen) == every - known
    assert len(seen) == len(set(seen))
    assert stopped.outcome() == whole.outcome()
    seen.clear()
    stopped()
    assert seen == []
    assert stopped.outcome() == whole.outcome()


def test_tuning_learns_from_images_of_its_own_the_same_in_each_pass(finished, monkeypatch):
    seen = {}

    def tuned_score(net, subnet, calibration, learnt, learnt_logits, *rest, steps, **options):
        seen.update(passes=[torch.cat(list(learnt())) for _ in range(2)], said=learnt_logits)
        seen.update(calibration=sum(map(len, calibration)), steps=steps)
        return 0.0

    monkeypatch.setattr(exploring, "tuned_score", tuned_score)
    config = finished.config
    images = share(config.data, describe(config.data), in_process=True)
    weights = Store(finished.folder).child("supernet").load_tensors(jobs.WEIGHTS)
    scorer = exploring.Scorer(config, images, weights, torch.device("cpu"))
    scorer(scorer.net.space.smallest, 0, config.explore.final_steps)
    assert seen["steps"] == 6 and seen["calibration"] == 32
    one, other = seen["passes"]
    assert len(one) == config.explore.tuning_images == 96 and torch.equal(one, other)
    assert torch.allclose(seen["said"], reference_logits(scorer.net, [one]), atol=1e-5)


def test_the_outcome_does_not_depend_on_who_scores(finished, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    alone = Exploration(finished, tmp_path / "alone")
    alone()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20)
    started = 0
    try:
        for workers in (1, 2):
            tuned = Exploration(
                finished, tmp_path / f"tuned-{workers}", in_process=False, explore_workers=workers
            )
            tuned()
            assert tuned.outcome() == alone.outcome()
            parts = tuned.store.child("explore", "parts")
            rows = [r for name in parts.names() for r in parts.read_table(name).to_pylist()]
            assert len(rows) == len(alone.outcome()[0])
            # none is stopped, not even while it starts and another is done with its batch
            before, started = started, len(ray._private.state.actors())
            assert started - before == workers
    finally:
        ray.shutdown()
