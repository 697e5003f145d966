"""The simulation of a search: what it counts, and that its page says so."""

import json
import sys


def test_a_small_search_is_simulated_to_its_end(tmp_path, monkeypatch):
    import scale

    command = "--model resnet18 --candidates 200 --workers 5 --dispatch-ms 1 --out"
    monkeypatch.setattr(sys, "argv", ["scale.py", *command.split(), str(tmp_path)])
    scale.main()
    (line,) = map(json.loads, (tmp_path / "search.jsonl").read_text().splitlines())
    # Eight generations of 20, and a quarter of each budget's ten, rounded up, scored again.
    assert line["candidates"] == 8 * (20 + 2 * 3)
    assert 0 < line["driver_busy"] < 1
    # No more than five workers can score, a candidate in ten seconds give or take.
    assert 0 < line["candidates_per_s"] < 5 / 10 * 1.1
    taken = line["search_ms_a_candidate"] / 1e3
    assert line["saturated_at"] < line["scoring_s"] / taken
    (*_, shown, _) = scale.table([line])
    assert shown.startswith("| resnet18 | 5 | 208 | 8 | 10 | 1 |")


def test_a_driver_that_dispatches_slowly_is_what_limits_the_search():
    import scale

    fleet = scale.Fleet(workers=20, scoring_s=0.1, dispatch_s=10.0)
    found = scale.search(scale.space_of("resnet18"), 200, fleet)
    assert found["driver_busy"] > 0.9
    assert found["candidates_per_s"] < 8 / 10
