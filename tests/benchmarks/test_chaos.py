"""The faults that are drawn, and the verdict on a run: it sees what it is there to see."""

import hashlib
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import chaos


def test_a_run_has_the_same_one_to_three_faults_each_time_and_all_kinds_come():
    plans = [chaos.plan(0, number) for number in range(100)]
    assert plans == [chaos.plan(0, number) for number in range(100)]
    assert plans != [chaos.plan(1, number) for number in range(100)]
    assert {len(faults) for faults in plans} == {1, 2, 3}
    assert {fault.kind for faults in plans for fault in faults} == set(chaos.FAULTS)
    stages = list(chaos.WORKERS)
    for faults in plans:
        order = [(stages.index(fault.stage), fault.share) for fault in faults]
        assert order == sorted(order)
        for fault in faults:
            assert chaos.FAULTS[fault.kind].stage in (None, fault.stage)


def sha(content):
    return hashlib.sha256(content).hexdigest()


def part(*keys):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"key": list(keys), "score": [1.0] * len(keys)}), buffer)
    return buffer.getvalue()


@pytest.fixture
def files():
    """What a run leaves, in small."""
    weights, state = b"weights", b"state"
    return {
        "supernet/model.safetensors": weights,
        "supernet/checkpoint-1/state.safetensors": state,
        "supernet/checkpoint-1/complete.json": json.dumps(
            {"step": 1, "sha256": {"state.safetensors": sha(state)}}
        ).encode(),
        "explore/parts/a.parquet": part("a", "b"),
        "explore/parts/c.parquet": part("c"),
        "manifest.json": json.dumps(
            {"stages": {"supernet": {"outputs": {"supernet/model.safetensors": sha(weights)}}}}
        ).encode(),
    }


def judged(files, expected=None):
    expected = {"supernet/model.safetensors": sha(b"weights")} if expected is None else expected
    return chaos.verdict(files.__getitem__, set(files), expected)


def test_a_run_that_is_whole_is_good(files):
    line = judged(files)
    assert line == {"different": [], "scored": 3, "scored_twice": 0, "damaged": []}
    assert chaos.good(line)


def test_other_weights_are_seen(files):
    line = judged(files, {"supernet/model.safetensors": sha(b"others"), "gone": sha(b"")})
    assert line["different"] == ["gone", "supernet/model.safetensors"]
    assert not chaos.good(line)


@pytest.mark.parametrize(
    "name", ["supernet/model.safetensors", "supernet/checkpoint-1/state.safetensors"]
)
def test_a_file_that_is_not_what_its_checksum_says_is_seen(files, name):
    files[name] = b"something else"
    assert judged(files, {})["damaged"] == [name]
    del files[name]
    line = judged(files, {})
    assert line["damaged"] == [name]
    assert not chaos.good(line)


def test_a_candidate_that_was_scored_twice_is_seen(files):
    files["explore/parts/d.parquet"] = part("d", "b")
    line = judged(files)
    assert line["scored_twice"] == 1
    assert not chaos.good(line)


def test_recovery_ends_with_the_first_progress_that_was_not_on_its_way():
    written = [(12.0, "supernet/a"), (12.5, "supernet/b"), (14.0, "lease/2"), (17.0, "supernet/c")]
    assert chaos._recovery(written, started=10.0, at=2.0, end=20.0) == 5.0
    assert chaos._recovery(written, started=10.0, at=8.0, end=20.0) == 12.0


def test_the_page_tells_how_long_each_fault_held_runs_up(files):
    import chaos_table

    assert set(chaos_table.WORDS) == set(chaos.FAULTS)
    line = {
        **judged(files), "rewritten_scores": 0, "submissions": 2, "seconds": 80.0, "cores": 2,
        "device": "x86_64", "revision": "abc",
        "faults": [
            {"kind": "driver", "stage": "explore", "came": True, "at": 3.0, "recovery_s": 31.4},
            {"kind": "head", "stage": "explore", "came": False},
        ],
    }  # fmt: skip
    failed = {"failed": True, "cores": 2, "device": "x86_64", "revision": "def"}
    first, *_, last, _ = chaos_table.table([line, failed])
    assert first.startswith("2 runs, 1 complete, 1 of them after at least one fault")
    assert "; revisions abc, def)" in first
    assert last == "| SIGKILL of the driver | explore | 1 | 31 | 31 |"
