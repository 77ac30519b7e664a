"""What the pages show of one run store, each as JSON. Called on threads: all of it may take long, or fail."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmops import api, overview, studies
from llmops.dashboard import encode
from llmops.dashboard.hub import Rows
from llmops.monitor import logs
from llmops.monitor.text import clean_lines
from llmops.runs.model import Run

SHOWN_OVER = 500  # of the runs that are over, the newest
WEEKS = 26
MOST_LINES = 5000  # of all ranks together
MOST_OF_A_LINE = 4000  # characters


@dataclass(frozen=True)
class Source:
    """One run store. Raises UserError, ClusterError and OSError as the command line does."""

    runs_url: str

    def rows(self) -> Rows:
        """All runs and studies that are not over, and the newest that are."""
        seen = overview.overview((), self.runs_url, over=SHOWN_OVER)
        return Rows({each["id"]: encode.row(each) for each in seen.rows}, seen.omitted)

    def run(self, run_id: str) -> bytes:
        """All about one run."""
        return encode.encode(api.detail(self._find(run_id)))

    def series(self, run_ids: Sequence[str]) -> bytes:
        """Curves of runs, by id."""
        runs = [self._find(run_id) for run_id in run_ids]
        found = api.series(runs)
        return encode.encode({"runs": [{"id": run.id, "name": run.name, "series": found[run.id]} for run in runs]})

    def study(self, study_id: str) -> bytes:
        """A study, its trials and how parameters and objective go together."""
        from llmops.sweep import page

        study = studies.find(study_id, self.runs_url)
        return encode.encode(page.data(study.record, studies.trials(study, with_points=True)))

    def goodput(self) -> bytes:
        """Where the node-hours of each week went, oldest first."""
        found = overview.goodput((), self.runs_url, by="week")
        return encode.encode({**found, "groups": found["groups"][-WEEKS:]})

    def logs(
        self, run_id: str, tail: int, rank: int | None, attempt: int | None, supervisor: bool, after: str
    ) -> bytes:
        """The last lines of a rank (None: of each), unless they are those that ``after`` stands for."""
        lines = _lines(self._find(run_id), tail, rank, attempt, supervisor)[-MOST_LINES:]
        mark = hashlib.sha256(encode.encode(lines)).hexdigest()[:16]
        return encode.encode({"mark": mark} if mark == after else {"mark": mark, "lines": lines})

    def cancel(self, ref: str, graceful: bool) -> bytes:
        """End a run, a study or a trial for good, without waiting until its job has gone."""
        if studies.is_study(ref, self.runs_url):
            studies.cancel(studies.find(ref, self.runs_url), graceful, wait=False)
            return encode.encode({"done": "its trials are told to end"})
        if studies.is_waiting(ref, self.runs_url):
            studies.cancel_waiting(ref, self.runs_url)
            return encode.encode({"done": "cancelled before it began"})
        found = api.cancel(self._find(ref), graceful, wait=False)
        return encode.encode({"done": found.state if found.state in api.OVER else "told to end"})

    def resume(self, run_id: str) -> bytes:
        """Go on with a run from its last committed step, or with what failed of a study."""
        if studies.is_study(run_id, self.runs_url):
            study = studies.find(run_id, self.runs_url)
            studies.resume(study, studies.plan(study, [], 0))
            return encode.encode({"done": "submitted"})
        resumed = api.resume(self._find(run_id))
        return encode.encode({"done": "it has finished: nothing was submitted" if resumed is None else "submitted"})

    def _find(self, run_id: str) -> Run:
        return api.find(run_id, self.runs_url)


def _lines(run: Run, tail: int, rank: int | None, attempt: int | None, supervisor: bool) -> list[dict[str, Any]]:
    return [
        {"attempt": line.attempt, "source": line.source, "text": _text(line.text)}
        for line in logs.tail(run, None if supervisor else rank, attempt, tail, supervisor)
    ]


def _text(text: str) -> str:
    shown = " ".join(clean_lines(text))
    return shown if len(shown) <= MOST_OF_A_LINE else shown[:MOST_OF_A_LINE] + "…"
