"""What a table of results lacks is trained once, and one failure costs one cell."""

import json

import pytest

GOOD, BAD, DEAR = "good", "bad", "dear"


def train(seed, cell, done):
    if cell["method"] == BAD:
        raise ValueError("a cell that fails")
    if cell["method"] == DEAR:
        return None
    figures = {"top1": 50.0, "epochs": 1, "training_macs": len(done), "seconds": 0.0}
    return {**cell, "seed": seed, **figures}


def make():
    return train


def cell(method):
    return {"method": method, "budget": 0.5, "equal": "epochs"}


def table(path, wanted, needs=lambda cell: []):
    from filling import Table

    return Table(path, wanted, needs)


def methods(path):
    return [json.loads(line)["method"] for line in path.read_text().splitlines()]


@pytest.mark.timeout(60)
def test_side_by_side_a_cell_that_fails_keeps_the_others_and_fails_the_whole(tmp_path):
    from filling import fill

    path = tmp_path / "lines.jsonl"
    wanted = [(0, cell(method)) for method in (BAD, GOOD, "other")]
    with pytest.raises(SystemExit, match="1 failed, and 0 need lines"):
        fill(table(path, wanted), make, jobs=2)
    assert sorted(methods(path)) == [GOOD, "other"]
    assert table(path, wanted).wanted == [(0, cell(BAD))], "what is there is not trained again"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cell_that_went_beyond_its_means_leaves_no_line(tmp_path, jobs):
    from filling import fill

    path = tmp_path / "lines.jsonl"
    fill(table(path, [(0, cell(DEAR)), (0, cell(GOOD))]), make, jobs)
    assert methods(path) == [GOOD]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("jobs", "said"), [(1, "needs the line of good"), (2, "1 need lines")])
def test_a_cell_without_the_line_that_it_reads_is_refused(tmp_path, jobs, said):
    from filling import fill

    alone = table(tmp_path / "lines.jsonl", [(0, cell("other"))], lambda cell: [GOOD])
    with pytest.raises(SystemExit, match=said):
        fill(alone, make, jobs)


@pytest.mark.timeout(60)
def test_side_by_side_a_cell_waits_for_the_line_that_it_reads(tmp_path):
    from filling import fill

    path = tmp_path / "lines.jsonl"
    wanted = [(0, cell("other")), (0, cell(GOOD))]
    fill(table(path, wanted, lambda cell: [GOOD] if cell["method"] == "other" else []), make, 2)
    assert methods(path) == [GOOD, "other"]
