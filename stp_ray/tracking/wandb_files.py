"""Weights & Biases: what a run leaves on disk for it.

wandb is always used offline here, whatever the configuration says: its client then asks no
server anything, so none can delay the run. `wandb_upload` sends the files while they grow.
"""

import io
import os
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import Store
from .base import Artifact, Draw, Metrics, Rows, file_name

if TYPE_CHECKING:
    from .wandb_upload import Uploads


def client() -> Any:
    """The wandb package, without the telemetry of its own that it sends even offline: where its
    server hangs, that delays the end of the process by ten seconds. It takes no key with the
    newline that a mounted secret may end in."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    if "WANDB_API_KEY" in os.environ:
        os.environ["WANDB_API_KEY"] = os.environ["WANDB_API_KEY"].strip()
    import wandb

    return wandb


def wandb_folder(store: Store, run_id: str) -> Path:
    """Where wandb keeps its files: the run's folder if that is local, else a cache folder.

    Never the current folder. WANDB_DIR, where the user has set it, wins.
    """
    if os.environ.get("WANDB_DIR"):
        return Path(os.environ["WANDB_DIR"])
    if store.local_path is not None:
        return store.local_path
    return _cache_folder() / "wandb" / run_id


def wandb_id(run_id: str) -> str:
    """What the ids of a run's stages begin with; wandb takes no long ones."""
    return file_name(run_id[-60:])


def sync_command(folder: Path, place: str) -> str:
    """What uploads a run's stages from where wandb keeps its files, for a shell.

    Args:
        folder: as of `wandb_folder`.
        place: as of `wandb_id`.
    """
    return f"wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*-{place}-*"


def _cache_folder() -> Path:
    """This project's folder among the user's caches, or a temporary one if that is read-only."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "stp_ray"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="stp_ray-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="stp_ray-"))


class WandbTracker:
    """One Weights & Biases run per stage, grouped by the run's id.

    Metrics are named "<kind of stage>/<metric>" over "<kind of stage>/step" (or what else the
    stage counts), so that the budgets of a run share their plots and no stage stretches the axis
    of another.

    Args:
        project: wandb project.
        run_id: the group.
        folder: where wandb's files go.
        uploads: sends them while they are written.
    """

    def __init__(
        self, project: str, run_id: str, folder: Path, uploads: "Uploads | None" = None
    ) -> None:
        self._project, self._run_id = project, run_id
        self._folder, self._uploads = folder, uploads
        self._kind = self._step = ""
        self._run: Any = None

    def start(self, stage: str, config: Metrics) -> None:
        wandb = client()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._kind = stage.partition("/")[0]
        self._step = f"{self._kind}/{config.get('counts', 'step')}"
        # Each part is cut by itself, so that a long name does not cost the stage's.
        place = f"{wandb_id(self._run_id)}-{file_name(stage)[:40]}"
        self._run = wandb.init(
            project=self._project,
            group=self._run_id,
            job_type=self._kind,
            name=stage,
            # Never that of an earlier attempt at the stage, whose rows it would overwrite.
            id=f"{place}-{time.strftime('%y%m%d%H%M%S')}",
            config=dict(config),
            dir=self._folder,
            mode="offline",
            reinit="create_new",
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_git=True,  # a git remote may hold a token
                x_disable_stats=False,  # of this machine: processor, memory, disk, GPU
            ),
        )
        # Steps of a stage that was resumed may repeat: wandb's own counter refuses that.
        self._run.define_metric(self._step, hidden=True)
        self._run.define_metric(f"{self._kind}/*", step_metric=self._step)
        if self._uploads is not None:
            self._uploads.start(Path(self._run.dir).parent / f"run-{self._run.id}.wandb")

    def log(self, metrics: Metrics, step: int) -> None:
        if self._run is not None:
            named = {f"{self._kind}/{name}": v for name, v in metrics.items() if name != "step"}
            self._run.log({**named, self._step: step})

    def summary(self, metrics: Metrics) -> None:
        if self._run is not None:
            self._run.summary.update(dict(metrics))

    def table(self, name: str, rows: Rows, axes: tuple[str, str] | None = None) -> None:
        if self._run is None or not rows:
            return
        wandb = client()
        columns = list(rows[0])
        table = wandb.Table(columns=columns, data=[[row[c] for c in columns] for row in rows])
        self._run.log({f"{self._kind}/{name}": table})
        if axes is not None:
            plot = wandb.plot.scatter(table, *axes, title=f"{name}: {axes[1]} against {axes[0]}")
            self._run.log({f"{self._kind}/{name}_plot": plot})

    def picture(self, name: str, draw: Draw) -> None:
        png = draw() if self._run is not None else None
        if png is None:
            return
        from PIL import Image

        with Image.open(io.BytesIO(png)) as image:
            self._run.log({f"{self._kind}/{name}": client().Image(image, caption=name)})

    def artifact(self, artifact: Artifact) -> None:
        if self._run is None:
            return
        for source in artifact.made_from:
            # What `use_artifact` does online, where it then waits for the server; offline it
            # refuses. The server knows the source again by its name and references.
            self._run._log_artifact(
                self._by_reference(source), is_user_created=True, use_after_commit=True
            )
        self._run.log_artifact(self._by_reference(artifact))

    def finish(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish()

    def _by_reference(self, artifact: Artifact) -> Any:
        wandb = client()
        from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry
        from wandb.sdk.lib.paths import LogicalPath

        name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{self._run_id}-{artifact.name}")[:128]
        made_from = [source.name for source in artifact.made_from]
        about = {"uri": artifact.uri, "sha256": dict(artifact.files), "made_from": made_from}
        entry = wandb.Artifact(name, type=artifact.kind, metadata=about)
        for file in artifact.files:
            path, uri = LogicalPath(file), f"{artifact.uri}/{file}"
            # As `add_reference(uri, checksum=False)`, which reads nothing and yet wants boto3 for
            # s3:// and credentials for gs://.
            entry.manifest.add_entry(ArtifactManifestEntry(path=path, ref=uri, digest=uri))
        return entry
