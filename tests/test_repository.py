"""What the repository says of itself stays true."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements():
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (r for group in groups for r in group):
        name = re.match(r"[\w.-]+(?:\[[^]]*\])?", requirement)[0]
        if not name.startswith(project["name"]):
            yield name


def test_every_dependency_has_its_reason_and_no_reason_stands_alone():
    text = (ROOT / "docs/dependencies.md").read_text()
    rows = re.findall(r"^(?:\| \w+ )?\| ([\w.\[\],-]+) \| (\S[^|]+) \|$", text, re.MULTILINE)
    assert {name for name, _ in rows} - {"package"} == set(requirements())


@pytest.mark.parametrize("path", [*sorted(ROOT.glob("docs/*.md")), ROOT / "CONTRIBUTING.md"])
def test_files_that_the_documents_name_exist(path):
    named = re.findall(
        r"`((?:docs|tests|cluster|benchmarks|stp_ray|pipelines|\.ci)/[\w./-]*\w)`", path.read_text()
    )
    for name in named:
        assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_tests_that_the_documents_name_exist():
    for path in ROOT.glob("docs/*.md"):
        for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", path.read_text()):
            assert f"def {name}(" in (ROOT / file).read_text(), f"{path.name} names {file}::{name}"
    assert "::test_" in (ROOT / "docs/reliability.md").read_text()


def test_license_is_apache_2_in_full():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text and len(text.split()) > 1500
    assert PROJECT["project"]["license"] == "Apache-2.0"


def test_make_knows_its_targets():
    for target in ("setup", "demo", "test", "docs", "lint", "format", "clean"):
        planned = subprocess.run(
            ["make", "--dry-run", target],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert planned.returncode == 0, planned.stderr
    checks = subprocess.run(
        ["make", "--dry-run", "test"], cwd=ROOT, capture_output=True, text=True, timeout=60
    ).stdout
    order = [
        checks.index(name)
        for name in ("ruff check", "ruff format --check", "mypy", "lint-imports", "pytest -n auto")
    ]
    assert order == sorted(order)


def test_files_of_the_package_are_declared():
    declared = PROJECT["tool"]["setuptools"]["package-data"]
    for path in (ROOT / "stp_ray").rglob("*"):
        if path.is_file() and path.suffix not in {".py", ".pyc"}:
            package = ".".join(path.parent.relative_to(ROOT).parts)
            assert any(path.match(pattern) for pattern in declared[package]), path


@pytest.mark.timeout(120)
def test_the_tests_of_the_stages_stay_on_one_worker(tmp_path):
    """Clusters are started one at a time only if they do."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "stages").mkdir()
    for name in ("one", "two"):
        (tmp_path / "stages" / f"test_{name}.py").write_text(
            "import os, pathlib, time\n"
            "import pytest\n"
            "@pytest.mark.parametrize('number', range(4))\n"
            "def test_it(number):\n"
            "    time.sleep(0.3)\n"
            f"    path = pathlib.Path(f'{name}-{{number}}.worker')\n"
            "    path.write_text(os.environ['PYTEST_XDIST_WORKER'])\n"
        )
    options = ["-q", "-n", "2", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=tmp_path, capture_output=True, text=True,
        timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    workers = [path.read_text() for path in tmp_path.glob("*.worker")]
    assert len(workers) == 8 and len(set(workers)) == 1
