"""The recipes that ship with the project. Imports nothing heavy: a shell asks while one types."""

import sysconfig
from pathlib import Path


def recipe_folder() -> Path:
    """Where the recipes lie: in the repository, else in the installation."""
    repository = Path(__file__).resolve().parent.parent / "pipelines" / "recipes"
    if repository.is_dir():
        return repository
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    installed = [Path(sysconfig.get_path("data", scheme)) for scheme in schemes]
    folders = [data / "share" / "stp_ray" / "recipes" for data in installed]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def recipe_names() -> list[str]:
    """Their names, sorted."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))
