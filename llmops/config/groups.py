"""The YAML files that a configuration is composed from: the shipped ones and those of ``--config-dir``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from llmops.config.overrides import resolver_calls
from llmops.errors import UserError
from llmops.resources import conf_dir

MAX_FILES = 2000  # a folder with more is not a folder of configuration
# Of the shipped folder: what `python -m llm.train` offers to Hydra's own multirun. A run is composed without it.
_OF_HYDRA = "hydra"
# YAML 1.1 reads 2:00:00 as a number in base 60.
_BASE_60 = re.compile(r"""^\s*(?:-\s+)?(?:[\w.-]+\s*:\s+)?([-+]?[1-9][0-9_]*(?::[0-5]?[0-9])+)\s*(?:\#.*)?$""", re.M)


class ConfFile(msgspec.Struct, frozen=True):
    """One file. ``name`` is its path below its folder, e.g. ``model/tiny.yaml``."""

    name: str
    path: Path
    content: bytes


class Groups(msgspec.Struct, frozen=True):
    """Every file that a composition may read, the shipped folder's first; sorted by name in each."""

    folders: list[Path]
    files: list[ConfFile]

    def options(self) -> dict[str, list[str]]:
        """Names to choose from for each group, e.g. ``{"model": ["1b", "tiny"]}``."""
        found: dict[str, set[str]] = {}
        for file in self.files:
            group, _, option = file.name.removesuffix(".yaml").rpartition("/")
            if group:
                found.setdefault(group, set()).add(option)
        return {group: sorted(options) for group, options in sorted(found.items())}

    def pure(self) -> bool:
        """Do these files alone decide what is composed? Not if one calls a resolver or reaches outside."""
        return all(not resolver_calls(text := file.content.decode()) and "../" not in text for file in self.files)

    def where(self, key: str) -> str | None:
        """``file:line`` that seems to set a dotted key; the user's own files first."""
        group, _, leaf = key.rpartition(".")
        line = re.compile(rf"^\s*(?:\S+\.)?['\"]?{re.escape(leaf)}['\"]?\s*:", re.M)
        candidates = [
            file for file in reversed(self.files) if (found := line.search(file.content.decode())) is not None
        ]
        top = group.split(".")[0]
        candidates.sort(
            key=lambda file: (not file.name.startswith(f"{top}/"), file.path.is_relative_to(self.folders[0]))
        )
        for file in candidates:
            found = line.search(file.content.decode())
            if found is not None:
                return f"{file.path}:{file.content.decode()[: found.start()].count(chr(10)) + 1}"
        return None


def read(config_dir: Path | None) -> Groups:
    """Read the shipped folder and the user's. Raises :class:`UserError` when the latter cannot be used."""
    shipped = conf_dir()
    folders = [shipped]
    files = list(_files(shipped, _OF_HYDRA))
    if config_dir is not None:
        own_dir = config_dir.expanduser().absolute()
        if not own_dir.is_dir():
            raise UserError(f"--config-dir {config_dir}: there is no such folder")
        own = list(_files(own_dir))
        _check_own(own_dir, own, {file.name for file in files})
        folders.append(own_dir)
        files += own
    return Groups(folders, files)


def check_yaml(groups: Groups) -> None:
    """Refuse what YAML would silently read as something else. Raises :class:`UserError`, and YAML's own errors."""
    import yaml

    for file in groups.files:
        if not file.path.is_relative_to(groups.folders[0]):
            with file.path.open("rb") as stream:  # a stream, so that errors name the file
                node = yaml.compose(stream, yaml.SafeLoader)
            if node is not None and not isinstance(node, yaml.MappingNode):
                raise UserError(f"{file.path}: holds no keys; expected lines such as key: value")
        text = file.content.decode()
        found = _BASE_60.search(text)
        if found is not None:
            line = text[: found.start(1)].count("\n") + 1
            raise UserError(f'{file.path}:{line}: YAML reads {found[1]} as a number in base 60; quote it: "{found[1]}"')


def _check_own(folder: Path, own: list[ConfFile], shipped: set[str]) -> None:
    if not own:
        raise UserError(f"--config-dir {folder}: holds no .yaml file; expected groups, e.g. cluster/mysite.yaml")
    for file in own:
        if file.name in shipped:
            raise UserError(f"{file.path}: llmops ships {file.name} and would ignore this one; give it another name")
    groups = {name.split("/")[0] for name in shipped if "/" in name}
    for group in groups:
        for path in sorted((folder / group).glob("*.yml")):
            raise UserError(f"{path}: only .yaml files are read; rename it to {path.stem}.yaml")


def _files(folder: Path, leave_out: str | None = None) -> Iterator[ConfFile]:
    count = 0
    for at, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != leave_out)
        for name in sorted(names):
            if not name.endswith(".yaml"):
                continue
            count += 1
            path = Path(at, name)
            if count > MAX_FILES:
                raise UserError(
                    f"{folder}: more than {MAX_FILES} .yaml files; --config-dir takes a folder of groups only"
                )
            try:
                content = path.read_bytes()
                content.decode()
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from error
            except UnicodeDecodeError as error:
                raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
            yield ConfFile(path.relative_to(folder).as_posix(), path, content)
