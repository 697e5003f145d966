"""The documentation: every block of code in it is run, and the site builds without a warning."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stp_ray.cli import app

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
#: Where commands need a cloud account.
CLOUD = {"cluster"}

BLOCK = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def blocks(page):
    return BLOCK.findall(page.read_text())


PAGES = [page for page in sorted(ROOT.glob("docs/*.md")) if blocks(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    names = {"__name__": "docs"}
    try:
        for language, title, code in blocks(page):
            if title:
                Path(title).write_text(code)
            elif language == "python":
                exec(compile(code, f"{page.name}: {code[:40]!r}", "exec"), names)
            elif page.stem != "tutorial" and re.fullmatch(r"stp [^\n|;&]*\n", code):
                # in this process, which has imported torch; the newcomer's path is taken in earnest
                done = CliRunner().invoke(app, shlex.split(code)[1:])
                assert done.exit_code == 0, f"{code}\n{done.output}"
            else:
                assert language == "sh", f"{page.name} has a block in {language!r}"
                done = subprocess.run(
                    ["bash", "-euc", code], env=environment, text=True, timeout=600,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )  # fmt: skip
                assert done.returncode == 0, f"{code}\n{done.stdout}"
    finally:
        sys.modules.pop("mynet", None)
    if page.stem == "tutorial":
        assert (tmp_path / "runs/latest/report.html").exists()
    if page.stem == "howto":
        assert names["small"](names["images"]).shape == (8, 10)


def test_commands_hide_nowhere():
    """Indented blocks are not run: only the cluster's page, for which an account is needed, and
    the recorded results may show commands in them."""
    for page in ROOT.glob("docs/*.md"):
        if page.stem not in CLOUD:
            commands = r"^    (?:\$ |stp |make |python |pip |import )"
            assert not re.findall(commands, page.read_text(), re.M), page.name
    assert {page.stem for page in PAGES} >= {"tutorial", "howto"}


def test_the_loop_of_ones_own_has_ten_lines():
    first = blocks(ROOT / "docs/howto.md")[0][2]
    given = re.compile("import|from|loader")
    code = [line for line in first.splitlines() if line and not given.match(line)]
    assert len(code) <= 10 and "Supernet.trace" in first and "backward" in first


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "reference/index.html").read_text()
    for name in ("Supernet.trace", "Supernet.extract", "SearchSpace.sample", "threads_per_worker"):
        assert name in page
    # What a browser loads by itself comes with the site.
    for html in tmp_path.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]* src="(https?:[^"]+)"', html.read_text())
        loaded += re.findall(r'<link rel="stylesheet" href="(https?:[^"]+)"', html.read_text())
        assert loaded == [], html
