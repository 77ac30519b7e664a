"""Where the files that travel with the package are: in the source tree, or inside the installed wheel."""

from __future__ import annotations

from pathlib import Path

from llmops.errors import UserError

PACKAGE = Path(__file__).resolve().parent


def conf_dir() -> Path:
    """Folder of the Hydra groups. Raises :class:`UserError` when the installation lacks it."""
    return _folder("conf")


def templates_dir() -> Path:
    """Folder of the Jinja2 templates. Raises :class:`UserError` when the installation lacks it."""
    return _folder("templates")


def _folder(name: str) -> Path:
    # A wheel carries them as llmops/_conf and llmops/_templates; the tree has them beside the package.
    for folder in (PACKAGE / f"_{name}", PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise UserError(f"{PACKAGE} is incomplete: it has no folder _{name}; install llmops again")
