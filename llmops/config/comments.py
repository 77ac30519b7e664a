"""What the comments in ``conf/`` say of each key: descriptions for editors and for completion."""

from __future__ import annotations

import re
from pathlib import Path

_KEY = re.compile(r"^(?P<indent> *)(?P<name>[A-Za-z_][\w-]*):(?P<rest>.*)$")
_COMMENT = re.compile(r"(?:^|\s)# (?P<text>.*)$")


def of_file(path: Path, prefix: str = "") -> dict[str, str]:
    """Dotted key -> the comment behind it; of a section without one, the comment above it.

    ``prefix`` is what the file's own keys lack, as ``model`` for those of a model's file.
    """
    found: dict[str, str] = {}
    above: list[str] = []
    stack: list[tuple[int, str]] = [(-1, prefix)]
    for line in path.read_text(encoding="utf-8").splitlines():
        key = _KEY.match(line)
        if key is None:
            above = [*above, line[2:]] if line.startswith("# ") else []
            continue
        indent = len(key["indent"])
        while stack[-1][0] >= indent:
            stack.pop()
        name = f"{stack[-1][1]}.{key['name']}".lstrip(".")
        stack.append((indent, name))
        comment = _COMMENT.search(key["rest"])
        if comment:
            found[name] = comment["text"]
        elif above and not key["rest"].strip():
            found[name] = " ".join(above)
        above = []
    return found


def headline(path: Path) -> str:
    """The first comment of a file, which says what the file is; empty where there is none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            return line.lstrip("# ")
    return ""


def of_folder(folder: Path) -> dict[str, str]:
    """:func:`of_file` of all files that are composed; the first file of a group that says something of a key counts."""
    found = of_file(folder / "config.yaml")
    for path in sorted(folder.glob("*/*.yaml")):
        if path.parent.name not in ("recipe", "hydra"):  # they set keys of other groups
            for key, text in of_file(path, path.parent.name).items():
                found.setdefault(key, text)
    return found
