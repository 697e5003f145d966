"""Storage is not trusted, names cannot leave it, and secrets stay where they are."""

import base64
import contextlib
import json
import os
import pickle
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import stp_ray as stp
from stp_ray.artifacts import Manifest, Store
from stp_ray.cli import app
from stp_ray.config import dump_config, load_config, run_id
from stp_ray.errors import ConfigError, StorageError, StpError
from stp_ray.models import build_model
from stp_ray.status import resumable
from tests.stages.runs import Process, environment, files, minimal, write_recipe
from tests.stages.runs import stp as command

pytestmark = pytest.mark.timeout(300)

#: As a machine may hold them: nothing of this is ever to be written down.
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED000000001",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret+0123456789abcdefghijk",
    "AWS_SESSION_TOKEN": "planted-session-token-0123456789",
    "AZURE_STORAGE_KEY": "planted-azure-key-0123456789==",
    "HF_TOKEN": "hf_plantedplantedplantedplantedpla",
    "RAY_AUTH_TOKEN": "planted-ray-token-0123456789",
    "WANDB_API_KEY": "deadbeef0123456789deadbeef0123456789dead",
}


@dataclass(frozen=True)
class Finished:
    """A run in a process of its own.

    Attributes:
        folder: the run's folder.
        home: everything that it could write to; the run's folder is below it.
        output: what it printed.
    """

    folder: Path
    home: Path
    output: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The least run, with secrets in its environment, and wandb writing files."""
    if not sys.platform.startswith("linux"):
        pytest.skip("finds the processes of a session through /proc")
    home = tmp_path_factory.mktemp("home")
    (home / "tmp").mkdir()
    content = minimal(tracking={"wandb": "offline", "console": True})
    recipe = write_recipe(home, content)
    variables = {n: v for n, v in environment().items() if not n.startswith(("XDG_", "WANDB_"))}
    variables |= {**SECRETS, "HOME": str(home), "TMPDIR": str(home / "tmp")}
    process = Process(
        command("run", str(recipe), f"storage={home / 'runs'}"),
        home / "output",
        env=variables,
        cwd=home,
    )
    try:
        assert process.wait(200) == 0, process.output
    finally:
        process.end()
    return Finished((home / "runs" / "latest").resolve(), home, process.output)


# -- nothing from storage is executed


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "executed"


@pytest.fixture
def payloads(marker, tmp_path):
    """A pickle and a .pt; both have been seen to work."""
    path = tmp_path / "payload.pt"
    torch.save({"weight": Payload(marker)}, path)
    found = {"pickle": pickle.dumps(Payload(marker)), "pt": path.read_bytes()}
    pickle.loads(found["pickle"])
    assert marker.exists()
    marker.rmdir()
    torch.load(path, weights_only=False)
    assert marker.exists()
    marker.rmdir()
    return found


#: Names under which something might look for a state.
STATES = (
    "model.pt",
    "config.pkl",
    ".validate_storage_marker",
    "supernet/model.pt",
    "supernet/trainer.pkl",
    "explore/searcher-state.pkl",
    "explore/trainable.pkl",
    "explore/tuner.pkl",
    "budget-0.5/model.pt2",
)
#: What a run has left itself.
OWN = (
    "supernet/model.safetensors",
    "budget-0.5/model.safetensors",
    "budget-0.5/predictions.parquet",
    "explore/candidates.parquet",
)


def plant_state(folder, payload):
    """A newest checkpoint, complete by its marker."""
    state = folder / "supernet" / "checkpoint-99999999"
    state.mkdir()
    for name in ("state.safetensors", "state.pt", "data.pkl", ".metadata.pkl"):
        (state / name).write_bytes(payload)
    (state / "meta.json").write_text("{}")
    sums = {name: Store(state).checksum(name) for name in ("state.safetensors", "meta.json")}
    (state / "complete.json").write_text(json.dumps({"step": 99999999, "sha256": sums}))


def plant(folder, payload):
    """A payload at every name that might be opened, with checksums that match."""
    for name in (*STATES, *OWN):
        (folder / name).write_bytes(payload)
    plant_state(folder, payload)
    manifest = json.loads((folder / "manifest.json").read_text())
    for stage in manifest["stages"].values():
        for name in stage["outputs"]:
            stage["outputs"][name] = Store(folder).checksum(name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", ["pickle", "pt"])
def test_a_planted_pickle_is_not_executed(finished, payloads, marker, tmp_path, kind):
    folder = tmp_path / "runs" / finished.folder.name
    shutil.copytree(finished.folder, folder, symlinks=True)
    plant(folder, payloads[kind])
    assert Manifest(Store(folder)).done("supernet")  # the planted files pass for the run's own
    runner = CliRunner()
    for arguments in (["status"], ["report"], ["resume"]):
        done = runner.invoke(app, [*arguments, str(folder)])
        assert not marker.exists(), arguments
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    with pytest.raises(StorageError, match="safetensors"):
        stp.load(str(folder / "budget-0.5"))
    assert not marker.exists()


def test_a_planted_state_is_passed_over_when_training_goes_on(finished, payloads, marker, tmp_path):
    folder = tmp_path / "runs" / finished.folder.name
    shutil.copytree(finished.folder, folder, symlinks=True)
    plant_state(folder, payloads["pt"])
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["stages"]["supernet"], manifest["stages"]["report"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "supernet" / "result.json").unlink()
    (folder / "supernet" / "model.safetensors").unlink()
    done = CliRunner().invoke(app, ["resume", str(folder)])
    assert done.exit_code == 0, done.output
    assert not marker.exists()
    # and the result is that of the run that nobody touched
    name = "supernet/model.safetensors"
    assert (folder / name).read_bytes() == (finished.folder / name).read_bytes()


def test_an_import_path_in_storage_is_not_followed(finished, marker, tmp_path):
    model = {"name": "os:mkdir", "kwargs": {"path": str(marker)}}
    with pytest.raises(ConfigError):
        build_model(model["name"], num_classes=10, **model["kwargs"])
    assert marker.exists()  # so it would run, if it were followed
    marker.rmdir()

    config = load_config(minimal(model=model, storage=str(tmp_path)))
    run = Store(tmp_path).child(run_id(config))
    run.write_json("config.json", dump_config(config))
    done = CliRunner().invoke(app, ["resume", run.uri])
    assert done.exit_code != 0 and "--factory os:mkdir" in done.output
    with pytest.raises(ConfigError, match=r"found 'my\.models:build'"):
        resumable(run, "my.models:build")
    # named by the caller, who trusts it
    assert resumable(run, "os:mkdir").model == config.model

    pruned = tmp_path / "pruned"
    shutil.copytree(finished.folder / "budget-0.5", pruned)
    description = json.loads((pruned / "model.json").read_text())
    (pruned / "model.json").write_text(json.dumps({**description, "model": model}))
    with pytest.raises(ConfigError, match="never followed"):
        stp.load(str(pruned))
    assert not marker.exists()


# -- nothing is written outside the storage


NASTY = st.lists(
    st.one_of(
        st.sampled_from([
            "..", ".", "", "/", "//", "\\", "~", "*", "?", "[a-z]", "%2e%2e", "%2F", "::", "file:",
            "file://", "memory://", "s3://", "\0", "\n", "a", "run", "latest", " ", "-", "$HOME",
            "\uff0e\uff0e", "\u202e",
        ]),
        st.text(max_size=6),
    ),
    max_size=6,
)  # fmt: skip
SEPARATOR = st.sampled_from(["", "/"])


def everything(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


def write_and_delete(store):
    store.write_bytes("kept/file", b"new")
    store.write_json("gone/file.json", {})
    store.delete("gone")


@settings(max_examples=60, deadline=None)
@given(parts=NASTY, separator=SEPARATOR)
def test_no_name_leaves_the_storage(parts, separator):
    name = separator.join(parts)
    with tempfile.TemporaryDirectory() as outer:
        root = Path(outer) / "root"
        root.mkdir()
        store = Store(root)
        uses = [
            lambda: store.write_bytes(name, b"new"),
            lambda: store.create_bytes(name, b"new"),
            lambda: store.delete(name),
            lambda: write_and_delete(store.child(name)),
            lambda: write_and_delete(store.child("run", name)),
        ]
        for use in uses:
            try:
                use()
            except StpError as error:
                assert "\n" not in str(error)
        assert {path.name for path in Path(outer).iterdir()} == {"root"}


@settings(max_examples=60, deadline=None)
@given(parts=NASTY, separator=SEPARATOR)
def test_no_run_id_leaves_the_storage(parts, separator):
    name = separator.join(parts)
    with tempfile.TemporaryDirectory() as outer:
        root = Path(outer) / "root"
        try:
            config = load_config({"name": name, "storage": str(root)})
            write_and_delete(Store(config.storage).child(run_id(config)))
        except StpError:
            return
        assert {path.name for path in Path(outer).iterdir()} == {"root"}
        (run,) = root.iterdir()
        assert run.name == run_id(config)


@settings(max_examples=60, deadline=None)
@given(parts=NASTY, separator=SEPARATOR)
def test_no_uri_leads_out_of_its_folder(parts, separator):
    tail = separator.join(parts)
    with tempfile.TemporaryDirectory() as outer:
        root = Path(outer) / "root"
        root.mkdir()
        (Path(outer) / "neighbour").mkdir()
        before = everything(Path(outer))
        for uri in (f"{root}/{tail}", f"file://{root}/{tail}"):
            try:
                store = Store(uri)
                write_and_delete(store)
            except StpError:
                continue
            assert (store.local_path / "kept" / "file").is_relative_to(root)
        added = everything(Path(outer)) - before
        assert all(path.parts[0] == "root" for path in added)


@settings(max_examples=60, deadline=None)
@given(parts=NASTY, separator=SEPARATOR)
def test_no_remote_uri_touches_its_neighbours(parts, separator):
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    neighbours = [f"/{top}/{run}/gone/file.json" for top in ("bucket", "other") for run in "ab"]
    for name in neighbours:
        memory.pipe_file(name, b"old")
    with contextlib.suppress(StpError):
        write_and_delete(Store(f"memory://bucket/x{separator.join(parts)}"))
    for name in neighbours:
        assert memory.cat_file(name) == b"old"
    assert all(name.startswith(("/bucket/x", *neighbours)) for name in memory.store)


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("runs/../../elsewhere", "'..'"), ("/data/../etc", "'..'"), ("file:///data/../etc", "'..'"),
        ("s3://bucket/../other", "'..'"), ("s3://bucket/./runs", "'.'"), ("s3://bucket/*", "'*'"),
        ("gs://bucket/run?", "'?'"), ("az://runs/[ab]", r"'\['"), ("s3://bucket/a\nb", "control"),
        ("/data/a\0b", "control"), ("simplecache::s3://bucket/runs", "'::'"),
    ],
)  # fmt: skip
def test_a_uri_with_a_way_out_is_refused(uri, told):
    with pytest.raises(StorageError, match=f"contains (a )?{told}.*expected"):
        Store(uri)


def test_a_folder_beside_the_current_one_may_be_named(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert Store("../runs").local_path == tmp_path / "runs"


# -- secrets


def written(home):
    """All that a process left: name -> content, tables decompressed."""
    for name in files(home):
        path = home / name
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            yield name, f"{table.schema.metadata}{table.to_pylist()}".encode()
        elif path.is_file():
            yield name, path.read_bytes()


def test_secrets_of_the_environment_are_written_nowhere(finished):
    content = dict(written(finished.home))
    assert any(name.endswith(".wandb") and b"supernet" in data for name, data in content.items())
    assert b"in_process" in content["output"] or b"supernet  started" in content["output"]
    for variable, secret in SECRETS.items():
        forms = (secret.encode(), base64.b64encode(secret.encode()).rstrip(b"="))
        found = [name for name, data in content.items() if any(form in data for form in forms)]
        assert not found, variable


def test_secrets_of_the_environment_are_not_printed(finished, monkeypatch):
    for variable, secret in SECRETS.items():
        monkeypatch.setenv(variable, secret)
    recipe = str(finished.home / "recipe.yaml")
    for arguments in (
        ["run", recipe, "--print-config"],
        ["status", str(finished.folder), "--json"],
    ):
        shown = CliRunner().invoke(app, arguments)
        assert shown.exit_code == 0 and shown.output
        assert not [name for name, secret in SECRETS.items() if secret in shown.output]


SECRET = "planted0secret"
URIS = [
    f"s3://AKIAPLANTED:{SECRET}@bucket/runs",
    f"s3://AKIAPLANTED:{SECRET}/with+odd=characters@bucket/runs",
    f"abfs://container/runs?sig={SECRET}",
    f"https://host/runs?X-Amz-Signature={SECRET}",
    f"https://user:{SECRET}@host/runs",
    f"simplecache::s3://AKIAPLANTED:{SECRET}@bucket/runs",
]


@pytest.mark.parametrize("uri", URIS)
@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "demo", "storage=URI"],
        ["run", "demo", "storage=URI", "--print-config"],
        ["run", "demo", "storage=URI", "--dry-run"],
        ["run", "demo", "data.name=parquet", "data.uri=URI"],
        ["run", "demo", "model.weights=URI"],
        ["status", "URI"],
        ["resume", "URI"],
        ["report", "URI"],
        ["export", "URI"],
        ["wandb-sync", "URI"],
        ["data", "describe", "URI"],
        ["data", "convert", "images", "URI"],
    ],
    ids=" ".join,
)
def test_a_uri_with_a_secret_is_refused_and_not_repeated(arguments, uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        folder = tmp_path / "images" / split / "cat"
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "1.png")
    before = files(tmp_path)
    done = CliRunner().invoke(app, [part.replace("URI", uri) for part in arguments])
    assert done.exit_code != 0
    assert isinstance(done.exception, SystemExit), done.exception
    assert "without credentials" in done.output
    assert SECRET not in done.output and "AKIAPLANTED" not in done.output
    assert files(tmp_path) == before
