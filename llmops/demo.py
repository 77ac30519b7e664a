"""``make demo``: a tiny language model is trained here, preempted in the middle, and finishes all the same."""

from __future__ import annotations

import os
import signal
import sys
import time

from llmops import api
from llmops.errors import ClusterError
from llmops.monitor import status as view
from llmops.runs.model import Run

PREEMPT_AT = 80  # of the recipe's 200 steps
DEADLINE_S = 600.0


def main() -> int:
    """Run the demo; 0 when the run finished after exactly one preemption."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console()
    console.print("[bold]llmops submit --backend local recipe=tiny --name demo[/]")
    run = api.submit(api.prepare(["recipe=tiny"], backend="local", name="demo"))
    console.print(f"submitted {run.id}: 2 ranks, FSDP, Shakespeare, byte by byte; stored in {run.url}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    deadline = time.monotonic() + DEADLINE_S
    preempted = False
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("starting", total=200)
        while True:
            now = api.status(run)
            (described,) = api.describe([now])
            step = described["step"] or 0
            loss = f"loss {described['loss']:.3f}" if described["loss"] is not None else "starting"
            progress.update(task, completed=step, description=f"attempt {len(now.run.attempts) - 1}  {loss}")
            if now.state in api.OVER:
                break
            if not preempted and step >= PREEMPT_AT:
                preempted = True
                pid = _supervisor(now.run)
                progress.print(f"[yellow]kill -TERM {pid}[/]: what a scheduler does when it preempts a job")
                os.kill(pid, signal.SIGTERM)
            if time.monotonic() > deadline:
                raise ClusterError(f"the demo did not finish within {DEADLINE_S:.0f} s; see `llmops logs {run.id}`")
            # The page a person watches: five looks a second.
            time.sleep(0.2)
    found = api.status(run)
    described = api.detail(run)
    view.render_run(described, console)
    samples = found.run.store.get("samples.txt").decode("utf-8", "replace")
    console.rule("what the model writes")
    console.out(samples.strip(), highlight=False)
    console.rule()
    reasons = [attempt["reason"] for attempt in described["attempts"]]
    console.print(f"look again: llmops status {run.id}   its output: llmops logs {run.id}")
    return 0 if found.state == "finished" and reasons == ["preempted", "finished"] else 1


def _supervisor(run: Run) -> int:
    """Pid of the local supervisor, which is part of its job id."""
    return int(str(run.job_id).split(":")[1])


if __name__ == "__main__":
    sys.exit(main())
