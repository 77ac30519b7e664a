"""``llmops ckpt verify``."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from llmops.checkpoints.change import is_gone, verify
from llmops.checkpoints.survey import Entry, Survey
from llmops.checkpoints.target import resolve
from llmops.errors import UserError
from llmops.monitor.checkpoints import size
from llmops.monitor.text import clean


def run(arguments: argparse.Namespace) -> int:
    """Check, and list every damage. Exit code 1 where there is any."""
    target = resolve(arguments.ref, arguments.runs_url)
    survey = Survey(target)
    if arguments.all and target.selector is not None:
        raise UserError(f"{arguments.ref}: --all verifies every checkpoint; name none after the @")
    chosen = survey.committed if arguments.all else [survey.choose(target.selector)]
    if not chosen:
        raise UserError(f"{target.url} has no committed checkpoints")
    bad = 0
    with _progress(chosen) as (advance, say):
        for entry in chosen:
            began = time.monotonic()
            try:
                report = verify(target, entry, advance)
            except UserError as error:
                if not arguments.all:
                    raise
                gone = is_gone(target, entry)
                bad += not gone
                say(f"{entry.name}  {'was removed meanwhile' if gone else f'NOT VERIFIED  {clean(str(error))}'}")
                continue
            rate = size(int(report.bytes / max(time.monotonic() - began, 1e-3)))
            bad += bool(report.damage)
            verdict = "DAMAGED" if report.damage else "ok"
            say(f"{entry.name}  {verdict}  {size(report.bytes)}, {report.tensors:,} tensors, {rate}/s")
            for damage in report.damage:
                say(f"  {clean(str(damage).removeprefix(f'{entry.commit.path}/'))}")
            for name in report.extra:
                say(f"  {clean(name)} is no part of it")
    return 1 if bad else 0


@contextlib.contextmanager
def _progress(chosen: Sequence[Entry]) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """(count bytes, print a line): with a bar on a terminal, and none elsewhere."""
    if not sys.stderr.isatty():
        yield lambda count: None, lambda line: print(line, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=sum(entry.bytes for entry in chosen))

        def say(line: str) -> None:
            bar.stop()  # the lines may go to the same terminal
            print(line, flush=True)
            bar.start()

        yield lambda count: bar.advance(task, count), say
