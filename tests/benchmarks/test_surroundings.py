"""What lines of results say about where they come from."""

import shutil
import subprocess

import pytest
import torch


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The module, in a repository of its own."""
    import surroundings

    path = tmp_path / "surroundings.py"
    shutil.copy(surroundings.__file__, path)
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, timeout=30)
    monkeypatch.setattr(surroundings, "__file__", str(path))
    return surroundings.surroundings, path


def test_the_revision_is_that_of_the_code(copied):
    surroundings, path = copied
    command = ["git", "rev-parse", "--short", "HEAD"]
    head = subprocess.check_output(command, cwd=path.parent, text=True, timeout=30).strip()
    assert surroundings(torch.device("cpu"))["revision"] == head
    path.write_text(path.read_text() + "# changed\n")
    assert surroundings(torch.device("cpu"))["revision"] == f"{head}+"


def test_no_repository_is_no_error(copied):
    surroundings, path = copied
    shutil.rmtree(path.parent / ".git")
    found = surroundings(torch.device("cpu"))
    assert found["revision"] == ""
    assert found["torch"] == torch.__version__
