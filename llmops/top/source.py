"""What the screens ask of the rest of llmops: all of it may take long, and is called on threads of its own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llmops import api, overview, studies
from llmops.errors import ClusterError, UserError
from llmops.monitor.text import clean, clean_lines, terminal_line
from llmops.runs.model import Run

Described = dict[str, Any]
SHOWN_OVER = 1000  # runs that are over; `llmops status` has the others
KEPT_LINES = 5000  # of a run's output; older ones are in `llmops logs`
FIRST_LINES = 2000  # of all ranks together, before those that are written from now on
MOST_OF_A_RANK = 500
ERROR_LINES = 200  # of the rank that failed


@dataclass(frozen=True)
class Source:
    """One run store. Raises UserError, ClusterError and OSError as the command line does."""

    runs_url: str

    def overview(self) -> overview.Overview:
        """All runs and studies that are not over, and the newest that are."""
        return overview.overview((), self.runs_url, over=SHOWN_OVER)

    def detail(self, run_id: str) -> Described:
        """All about one run."""
        return api.detail(api.find(run_id, self.runs_url))

    def trials(self, study_id: str) -> Described:
        """A study and its trials."""
        study = studies.find(study_id, self.runs_url)
        return studies.describe(study, studies.trials(study))

    def cancel(self, ref: str, graceful: bool) -> str:
        """End a run, a study or a trial for good; what became of it."""
        if studies.is_study(ref, self.runs_url):
            return str(studies.cancel(studies.find(ref, self.runs_url), graceful)["reason"])
        if studies.is_waiting(ref, self.runs_url):
            studies.cancel_waiting(ref, self.runs_url)
            return "cancelled before it began"
        found = api.find(ref, self.runs_url)
        if (before := api.status(found)).state in api.OVER:
            return f"is over already: {before.state}"
        ended = api.cancel(found, graceful)
        return ended.state if ended.state in api.OVER else "told to end, not over yet"

    def resume(self, ref: str) -> str:
        """Go on with a run or a study; what became of it."""
        if studies.is_study(ref, self.runs_url):
            study = studies.find(ref, self.runs_url)
            plan = studies.plan(study, [], 0)
            if not plan.trials:
                return "nothing is left to run"
            studies.resume(study, plan)
            return f"{len(plan.trials)} trials run again"
        resumed = api.resume(api.find(ref, self.runs_url))
        if resumed is None:
            return "has finished; raise train.max_steps to train it further"
        return f"resumed ({resumed.backend} job {resumed.job_id})"

    def errors(self, ref: str) -> list[str]:
        """What is known of why a run failed: of its attempts, newest first, and of the ranks of the last that did."""
        from llmops.monitor.error_report import report
        from llmops.monitor.log_errors import errors, failed_attempts
        from llmops.monitor.log_streams import Selection

        found = api.find(ref, self.runs_url)
        (described,) = api.describe([api.status(found)])
        said = [f"problem: {clean(each)}" for each in described["problems"]]
        for attempt in reversed(described["attempts"]):
            words = "; ".join(clean(attempt[key]) for key in ("why", "detail") if attempt[key])
            if attempt["ended"] is not None:
                said.append(f"attempt {attempt['number']}: {words or clean(attempt['state'])}")
        if failed := failed_attempts(found):
            told = report(errors(found, failed[-1].number, Selection()))
            said += ["", *(clean_lines(line)[0] for line in told)]
        elif described["error"]:
            said += ["", "last error", *("  " + line for line in clean_lines(described["error"]))]
        return said or ["no error is known"]

    def lines(self, run_id: str, done: Callable[[], bool], wait: Callable[[float], object]) -> Iterator[str]:
        """The last lines of all ranks, then what they write until ``done``; fit for a terminal, colours included."""
        found = api.find(run_id, self.runs_url)
        for attempt, source, text in _follow(found, done, wait):
            yield f"[{attempt}/{clean(source)}] {terminal_line(text)}"


def _follow(found: Run, done: Callable[[], bool], wait: Callable[[float], object]) -> Iterator[tuple[int, str, str]]:
    """The one place that knows how output is read."""
    from llmops.monitor import logs

    ranks = found.record.nodes * found.record.ranks_per_node if found.record else 1
    first = min(max(FIRST_LINES // max(ranks, 1), 1), MOST_OF_A_RANK)
    for line in logs.follow(found, done, n=first, wait=wait):
        yield line.attempt, line.source, line.text


class Lines:
    """A run's output as it is read on a thread of its own; holds the last :data:`KEPT_LINES`."""

    def __init__(self, source: Source, run_id: str, over: Callable[[], bool]) -> None:
        self._source, self._run_id, self._over = source, run_id, over
        self._closed, self._lock = threading.Event(), threading.Lock()
        self._kept: deque[str] = deque(maxlen=KEPT_LINES)
        self._count = 0
        self.trouble = ""
        self.ended = False
        # A daemon: leaving the screen, or the program, must not wait for a store that hangs.
        threading.Thread(target=self._run, daemon=True).start()

    def after(self, number: int) -> tuple[int, list[str]]:
        """How many lines there have been, and those after the first ``number`` as far as they are kept."""
        with self._lock:
            new = min(self._count - number, len(self._kept))
            return self._count, list(self._kept)[len(self._kept) - new :] if new > 0 else []

    def close(self) -> None:
        """Read no further."""
        self._closed.set()

    def _run(self) -> None:
        try:
            done = lambda: self._closed.is_set() or self._over()  # noqa: E731
            for line in self._source.lines(self._run_id, done, self._closed.wait):
                with self._lock:
                    self._kept.append(line)
                    self._count += 1
                if self._closed.is_set():
                    return
        except (UserError, ClusterError, OSError) as error:
            self.trouble = clean(" ".join(str(error).split()))
        self.ended = True
