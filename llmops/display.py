"""How a run looks in a notebook, and while somebody waits for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmops.api import Status

_COLOURS = {"finished": "#2e7d32", "failed": "#c62828", "cancelled": "#757575", "running": "#1565c0"}


@contextmanager
def shown(run_id: str, progress: bool | None) -> Iterator[Callable[[Status], None]]:
    """Gives a function that shows a state in place of the one before. ``progress``: None where somebody looks."""
    kernel = _in_kernel()
    if progress is False or (progress is None and not kernel and not sys.stderr.isatty()):
        yield lambda status: None
    elif kernel:
        yield _in_notebook()
    else:
        from rich.console import Console

        with Console(stderr=True).status(run_id) as line:
            yield lambda status: line.update(words(status))


def _in_kernel() -> bool:
    """Whether this is a notebook. IPython is asked only where somebody has imported it."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    return shell is not None and hasattr(shell, "kernel")


def _in_notebook() -> Callable[[Status], None]:
    """One output that is replaced, as long as what it says changes."""
    display: Any = sys.modules["IPython"].display.display
    handles: list[Any] = []
    before = ""

    def show(status: Status) -> None:
        nonlocal before
        text = html(status)
        if text == before:
            return
        before = text
        data = {"text/html": text, "text/plain": words(status)}
        if handles:
            handles[0].update(data, raw=True)
        else:
            handles.append(display(data, raw=True, display_id=True))

    return show


def facts(status: Status) -> dict[str, str]:
    """What is worth a line, by name."""
    from llmops import api

    known = api.describe([status])[0] if status.run.record is not None else {}
    step, of = known.get("step"), known.get("max_steps")
    loss = known.get("loss")
    found = {
        "state": status.state,
        "reason": status.reason,
        "step": "" if not step else f"{step:,}" + (f" of {of:,}" if of else ""),
        "loss": "" if loss is None else f"{loss:.4f}",
        "attempts": str(len(status.run.attempts)) if len(status.run.attempts) > 1 else "",
        "job": f"{status.run.backend} {status.run.job_id}" if status.run.job_id else "",
        "in": status.run.url,
    }
    return {name: value for name, value in found.items() if value}


def words(status: Status) -> str:
    """One line for a terminal."""
    told = facts(status)
    more = [f"{name} {told[name]}" for name in ("step", "loss", "attempts") if name in told]
    return " ".join(f"{status.run.id} {', '.join([told['state'], *more])}".split())


def html(status: Status) -> str:
    """A small table."""
    told = facts(status)
    told["state"] = f'<b style="color:{_COLOURS.get(status.state, "inherit")}">{escape(status.state)}</b>'
    rows = [
        f"<tr><th style='text-align:left'>{name}</th><td style='text-align:left'>"
        f"{value if name == 'state' else escape(value)}</td></tr>"
        for name, value in told.items()
    ]
    title = escape(status.run.id)
    return f"<table><caption style='text-align:left'><code>{title}</code></caption>{''.join(rows)}</table>"
