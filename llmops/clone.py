"""A new run out of an old one: its configuration as it was resolved, with some of it changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmops import launch
from llmops.config.recompose import changed
from llmops.errors import UserError
from llmops.runs import records
from llmops.runs.model import Run

END = "-clone"


def prepare(
    run: Run,
    overrides: Sequence[str] = (),
    *,
    backend: str | None = None,
    name: str | None = None,
    own_code: bool = False,
    config_dir: Path | None = None,
) -> launch.Prepared:
    """A run with the configuration that ``run`` has now, changed by ``overrides``: ``key=value``, and ``group=option``,
    which replaces a section. Nothing is written. It is for the same run store, and starts fresh.

    ``own_code``: with the snapshot of ``run`` instead of one of the current code. Raises :class:`UserError` for what
    cannot work.
    """
    record = run.record
    if record is None:
        raise UserError(f"{run.url}: {run.problems[0]}; it cannot be cloned")
    path = run.submissions[-1].record.config if run.submissions else "config.yaml"
    try:
        text = run.store.get(path).decode()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise UserError(f"{run.url}/{path} is missing or damaged ({error}); it cannot be cloned") from error
    moved = [f"cluster={backend}"] if backend and backend != run.backend else []
    composed = changed(text, [*moved, *overrides], launch.check_name(name or name_of(record.name)), config_dir)
    prepared = launch.prepare(composed, records.root_of(run.url), again=True)
    code = record.code if own_code else None
    if own_code and code is None:
        raise UserError(f"{run.id} has no snapshot of its code; leave --code out")
    if code is not None and not prepared.runs.exists(records.archive_path(code.sha256)):
        raise UserError(f"{prepared.runs.url}/{records.archive_path(code.sha256)} is gone; leave --code out")
    return launch.Prepared(**{**vars(prepared), "cloned_from": run.id, "code": code})


def name_of(name: str) -> str:
    """What a clone is called where nothing else is said; a clone of a clone is called the same."""
    return name if name.endswith(END) else name[: launch.MAX_NAME - len(END)] + END
