"""From a JobSpec and a template to the text that is submitted. Every value is quoted by construction."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmops.errors import UserError
from llmops.resources import templates_dir

if TYPE_CHECKING:
    import jinja2


def sbatch_value(value: object) -> str:
    """Quote one value for an ``#SBATCH`` line.

    sbatch groups by double quotes and takes a backslash as an escape inside them; nothing is expanded, but an unquoted
    ``#``
    starts a comment. A line break would end the directive and cannot be quoted at all. (Source: slurm_opt.c, tags
    22.05-26.05.)
    """
    text = str(value)
    if any(character in text for character in "\n\r\0"):
        raise UserError(f"a line break or NUL cannot be passed to sbatch: {text!r}; remove it")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def sbatch_options(options: Mapping[str, object]) -> list[str]:
    """``--name="value"`` for each option; True gives the bare flag, None and False give nothing."""
    lines = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        lines.append(f"--{name}" if value is True else f"--{name}={sbatch_value(value)}")
    return lines


def json_value(value: object) -> str:
    """A value as JSON that every YAML parser reads as the same value: on one line, and of printable characters.

    YAML knows no surrogate pairs, takes some characters for line breaks that JSON does not, and refuses others.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return re.sub(
        "[^\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]",
        lambda found: f"\\u{ord(found[0]):04x}",
        text,
    )


@functools.lru_cache(maxsize=16)
def _compiled(path: Path, text: str) -> jinja2.Template:
    """Compiled once: a study is rendered to be checked, and once more to be submitted."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([path.parent, templates_dir()]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701  (shell, not HTML: values pass through the filters below)
    )
    environment.filters["shell"] = lambda value: shlex.quote(str(value))
    environment.filters["sbatch"] = sbatch_value
    environment.filters["json"] = json_value
    return environment.from_string(text)


def render_template(name: str, override: str | None, values: Mapping[str, Any]) -> str:
    """Fill the template ``name``, or the user's own at ``override``, which may include those that are shipped.

    A name that the template does not know is an error.
    """
    import jinja2

    path = Path(override).expanduser() if override else templates_dir() / name
    try:
        return _compiled(path, path.read_text(encoding="utf-8")).render(values)
    except OSError as error:
        raise UserError(f"cluster.template={override}: cannot be read ({error.strerror}); correct the path") from error
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise UserError(f"{path}{f':{line}' if line else ''}: {error}; correct the template") from error
