"""The recipes that ship with the project. Imports nothing heavy: a shell asks while one types."""

import sysconfig
from pathlib import Path


def recipe_folder() -> Path:
    """Where the recipes lie: in the repository, else in the installation."""
    repository = Path(__file__).resolve().parent.parent / "pipelines" / "recipes"
    if repository.is_dir():
        return repository
    return Path(sysconfig.get_path("data")) / "share" / "stp_ray" / "recipes"


def recipe_names() -> list[str]:
    """Their names, sorted."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))
