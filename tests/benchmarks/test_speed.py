"""What the measurements share: their lines, the page, and what they need."""

import json
import runpy
import shlex
import sys

import pytest

from .conftest import BENCHMARKS


def test_a_command_says_again_what_it_said_before(tmp_path):
    import speed

    path = tmp_path / "step.jsonl"
    line = {"command": "step", "device": "one", "figure": 1}
    speed.keep("step", [line], path)
    speed.keep("step", [{**line, "device": "two"}], path)
    speed.keep("step --repeats 9", [{**line, "command": "step --repeats 9"}], path)
    speed.keep("step", [{**line, "figure": 2}, {**line, "figure": 3}], path)
    kept = [json.loads(text) for text in path.read_text().splitlines()]
    assert [(each["device"], each["figure"]) for each in kept] == [
        ("two", 1),
        ("one", 1),
        ("one", 2),
        ("one", 3),
    ]


def test_every_action_is_in_all_and_its_command_is_understood(monkeypatch):
    import speed

    asked = []
    monkeypatch.setattr(speed, "run", lambda arguments, command: asked.append(command))
    for command, _ in speed.EVERYTHING:
        monkeypatch.setattr(sys, "argv", ["speed.py", *shlex.split(command), "--out", "elsewhere"])
        speed.main()
    # Each line is kept under the command itself, wherever it is kept.
    assert asked == [command for command, _ in speed.EVERYTHING]
    assert {command.split()[0] for command in asked} == set(speed.ACTIONS)


def test_all_gives_up_soon_after_an_hour():
    import speed

    assert sum(seconds for _, seconds in speed.EVERYTHING) <= 4500


def test_what_has_no_lines_has_no_table_and_the_rest_of_the_page_stays(tmp_path):
    from speed_tables import MARKS, performance

    page = tmp_path / "performance.md"
    page.write_text(f"before\n\n{MARKS[0]}\nold\n{MARKS[1]}\n\nafter\n")
    kept = tmp_path / "speed"
    kept.mkdir()
    (kept / "memory.jsonl").write_text(
        json.dumps(
            {
                "model": "resnet20",
                "subnets": 1,
                "device": "x86_64",
                "threads": 1,
                "others": 1.5,
                "peak_mb": {"dense": 100.0, "ours": 120.0},
                "ratio": {"dense": 1.0, "ours": 1.2},
            }
        )
    )
    performance(kept, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\n\nafter\n")
    assert "old" not in text and "A step beside" not in text
    assert "| resnet20 | 1 | x86_64, 1 thread, others used 1.5 cores | 100 | 1.20 |" in text


@pytest.mark.parametrize("action", ["step", "autonas", "memory", "parallel"])
def test_training_is_measured_without_ray_and_pydantic(action, monkeypatch, capsys):
    for name in [n for n in sys.modules if n.partition(".")[0] in ("measure", "speed", "stp_ray")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("ray", "pydantic"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", ["speed.py", action, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(BENCHMARKS / "speed.py"), run_name="__main__")
    assert end.value.code == 0
    assert "--model" in capsys.readouterr().out
