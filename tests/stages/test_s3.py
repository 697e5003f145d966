"""A whole run whose storage is a bucket: two data-parallel workers, a moto server for S3."""

import io
import json
import re

import pyarrow.parquet as pq
import pytest
import safetensors.torch

from tests.stages.runs import ARTIFACTS, BOOKKEEPING, BUDGETS, kept

pytestmark = pytest.mark.timeout(720)


def test_the_bucket_holds_everything_that_a_run_leaves(undisturbed):
    assert kept(undisturbed.files) == ARTIFACTS | BOOKKEEPING
    checkpoints = {name.split("/")[1] for name in undisturbed.files if "/checkpoint-" in name}
    assert len(checkpoints) == 2
    assert all(name.startswith(f"runs/{undisturbed.run_id}/") for name in undisturbed.bucket)


def test_its_summary_names_the_bucket(undisturbed):
    summary = json.loads(undisturbed.files["summary.json"])
    assert summary["run_id"] == undisturbed.run_id
    assert summary["storage"] == "s3://experiments/runs"
    assert summary["dense_top1"] is None
    assert set(summary["budgets"]) == set(BUDGETS)
    for label, budget in summary["budgets"].items():
        assert budget["uri"] == f"s3://experiments/runs/{undisturbed.run_id}/budget-{label}"
        assert budget["retention_dense"] is None
        assert budget["macs"] <= float(label) * summary["macs"]


def test_its_files_are_whole(undisturbed):
    for name, data in undisturbed.files.items():
        if name.endswith(".safetensors"):
            assert safetensors.torch.load(data)
        elif name.endswith(".parquet"):
            assert pq.read_table(io.BytesIO(data)).num_rows > 0
        elif name.endswith(".json"):
            json.loads(data)
        elif name.endswith(".jsonl"):
            events = [json.loads(line)["event"] for line in data.splitlines()]
            assert events[0] == "start"


def test_nothing_is_written_elsewhere_but_caches(undisturbed):
    assert undisturbed.outside["cwd"] == set()
    caches = re.compile(r"\.cache/|\.config/matplotlib/")
    assert {name for name in undisturbed.outside["home"] if not caches.match(name)} == set()
    # Ray's own sessions; what the stages put there is gone.
    assert {name.split("/")[0] for name in undisturbed.outside["temporary"]} <= {"ray"}


def test_its_keys_are_written_nowhere(undisturbed):
    """Neither into the bucket nor into what it printed nor into Ray's own logs."""
    assert undisturbed.leaks == set()
    assert any(name.endswith(".log") for name in undisturbed.outside["temporary"])


def test_it_tells_how_far_it_is(undisturbed):
    assert re.search(r"^supernet  \d+/54 .* images/s", undisturbed.output, re.MULTILINE)
    for stage in ("supernet", "explore", *(f"finalize/{label}" for label in BUDGETS)):
        assert re.search(rf"^{re.escape(stage)}  done in \d+:\d+", undisturbed.output, re.MULTILINE)
    assert undisturbed.output.splitlines()[-1].endswith(f"{undisturbed.run_id}/report.html")
