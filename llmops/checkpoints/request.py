"""Asking a run that is training for a checkpoint, and waiting for it."""

from __future__ import annotations

import time
from collections.abc import Callable

from llm.checkpoint.format import Commit
from llm.checkpoint.lineage import newest_commit
from llm.checkpoint.requests import ask
from llmops.checkpoints.target import Target, told
from llmops.errors import ClusterError, UserError
from llmops.runs.records import load_run, whoami

HEARD_S = 60.0  # a run looks every few seconds
POLL_S = 0.5


def save_now(target: Target, wait_s: float, say: Callable[[str], None]) -> Commit:
    """Have the run commit a checkpoint; returns the commit. ``say`` is told what is waited for.

    Raises UserError when no attempt is at work, ClusterError when it does not answer within ``wait_s`` or ends before.
    """
    run = target.run
    if run.record is not None and run.record.kind != "llm":
        raise UserError(f"{run.record.id} runs a program of its own, which saves when it wants to")
    newest = run.newest
    if newest is None or newest.end is not None:
        raise UserError(f"{run.url} is not training at the moment: `llmops status` says why")
    with told(target.url):
        before = newest_commit(target.storage)
        path = ask(target.storage, "@".join(whoami()))
        folder, name = path.split("/")
        say("waiting for the run to hear")
        if not _wait(lambda: name not in target.storage.list(folder), min(HEARD_S, wait_s)):
            target.storage.remove(path)
            raise ClusterError(
                f"{target.url}: nobody heard within {min(HEARD_S, wait_s):.0f} s; is attempt {newest.number} alive?"
            )
        say("heard; waiting for the commit")
        until = time.monotonic() + wait_s
        while (commit := newest_commit(target.storage)) in (None, before):
            if load_run(run.store).by_number[newest.number].end is not None:
                raise ClusterError(
                    f"{target.url}: attempt {newest.number} ended before it committed: see `llmops status`"
                )
            if time.monotonic() > until:
                raise ClusterError(
                    f"{target.url}: heard, but nothing was committed within {wait_s:.0f} s: see `llmops logs`"
                )
            time.sleep(POLL_S)
    assert commit is not None
    return commit


def _wait(done: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            return False
        time.sleep(POLL_S)
    return True
