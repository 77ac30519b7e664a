"""``python -m llmops.sweep.follow``: watches one trial from beside its supervisor, which waits for it at the end.

It tells the study's pruner how the objective goes, and stops the trial by an intent in the run's directory, which the
supervisor looks for. When standard input ends, the supervisor is done or dead: then it records how the trial ended.
Killed at any time, it may be started again, and what it left out `llmops sweep status` makes good.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llmops.errors import ClusterError, UserError
from llmops.runs import records as runs
from llmops.runs.model import Run
from llmops.runs.remote import FLUSH_S, SIGNALS
from llmops.runs.store import Store, open_store
from llmops.sweep import objective, records

if TYPE_CHECKING:
    from llmops.sweep.optimizer import Optimizer

POLL_S, REMOTE_POLL_S = 1.0, 5.0
END_S = 20.0  # for the result, once the supervisor is gone or done
RETRY_S = 0.5
SHARE = 0.05  # of a core, that reading a long run may cost
SLOWEST_S = 30.0  # between two looks, all the same
REPORTS = 50  # values that a pruner sees of one trial, where the study does not say how many


class Follower:
    """Follows one submission of a trial's run. Every method may be called again after a failure."""

    def __init__(self, study_url: str, trial: int, run_url: str, submission: int) -> None:
        self.study_url, self.trial, self.run_url, self.submission = study_url, trial, run_url, submission
        self.decided = False
        self.cost = 0.0  # seconds of a core, of the last reading of the objective
        self._study: records.Study | None = None
        self._optimizer: Optimizer | None = None
        self._store: Store | None = None
        self._run: Run | None = None
        self._reader: objective.Reader | None = None
        self._reported = -1  # the last step that the pruner knows
        self._unasked: objective.Point | None = None  # that one, until the pruner has judged it

    @property
    def store(self) -> Store:
        """Opened on first use, so that what is wrong with it ends nothing."""
        if self._store is None:
            self._store = open_store(self.run_url)
        return self._store

    @property
    def study(self) -> records.Study:
        if self._study is None:
            self._study = records.load_study(open_store(self.study_url), with_results=False)
        return self._study

    @property
    def optimizer(self) -> Optimizer:
        if self._optimizer is None:
            from llmops.sweep.optimizer import Optimizer

            self._optimizer = Optimizer.open(self.study)
        return self._optimizer

    def look(self) -> None:
        """One look at the run, and what follows from it."""
        if self.decided:
            return
        sweep = self.study.record.sweep
        run = self._changed()
        if self._reader is None:
            self._reader = objective.Reader(self.store, sweep.objective)
        before = time.process_time()
        points = self._reader.points(run)
        self.cost = time.process_time() - before
        bad = next(((step, value) for step, value in points if not math.isfinite(value)), None)
        ran = objective.seconds(run, time.time())
        if bad is not None and sweep.stop_on_nan:
            self._stop("nan", f"{sweep.objective} was {bad[1]} at step {bad[0]}")
        elif sweep.trial_minutes is not None and ran >= 60 * sweep.trial_minutes:
            last = f", at step {points[-1][0]}" if points else ""
            self._stop("timeout", f"it ran for {ran / 60:.1f} of {sweep.trial_minutes:g} minutes{last}")
        elif sweep.pruner.name != "none":
            self._report(points)
            if self._unasked is not None and self.optimizer.should_prune(self.trial):
                step, value = self._unasked
                self._stop("pruned", f"{sweep.pruner.name}: {sweep.objective} was {value:.6g} at step {step}")
            self._unasked = None

    def finish(self) -> bool:
        """Record how the trial ended. False when it is not over: another attempt follows, or another submission."""
        from llmops.sweep.optimizer import needed

        run = runs.load_run(self.store)
        sweep = self.study.record.sweep
        if not run.submissions or run.submissions[-1].number != self.submission:
            return False
        result = objective.result_of(run, self.trial, sweep, run.record.params if run.record else {})
        if result is None:
            return False
        records.write_result(self.study.store, result)
        if needed(sweep):
            if sweep.pruner.name != "none":
                self._report(objective.series(run, sweep))
            self.optimizer.tell(result)
        return True

    def _changed(self) -> Run:
        """The run, read again only when it has another attempt."""
        names = self.store.list("attempts")
        known = self._run
        if known is None or len(known.attempts) != len(names) or known.record is None:
            self._run = known = runs.load_run(self.store)
        return known

    def _report(self, points: Sequence[objective.Point]) -> None:
        """Tell the pruner what it has not seen."""
        for step, value in due(points, self._every(), self._reported):
            self.optimizer.report(self.trial, step, value)
            self._reported, self._unasked = step, (step, value)

    def _every(self) -> int:
        record = self.study.record
        return record.sweep.report_every or max(1, (record.max_steps or 0) // REPORTS)

    def _stop(self, outcome: str, reason: str) -> None:
        """Recorded once: the first intent counts, whoever had it."""
        runs.write_intent(self.store, self.submission, graceful=False, by="sweep", outcome=outcome, reason=reason)
        self.decided = True


def due(points: Sequence[objective.Point], every: int, after: int) -> Iterator[objective.Point]:
    """Points past step ``after`` that a pruner sees: multiples of ``every``, and of a sparse series all.

    Which ones does not depend on when they are looked at, so that trials have the same steps to compare.
    """
    last = 0
    for step, value in points:
        if step % every == 0 or step - last >= every:
            last = step
            if step > after:
                yield step, value


class Complaints:
    """Says on standard error what is wrong, once as long as it lasts."""

    def __init__(self) -> None:
        self.said = ""

    def hear(self, error: Exception | None) -> None:
        text = str(error) if error else ""
        if text and not self.said:
            print(f"llmops: the study is not told how this trial goes for now: {text}", file=sys.stderr, flush=True)
        elif self.said and not text:
            print("llmops: the study is told again", file=sys.stderr, flush=True)
        self.said = text


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow until the end of standard input. 0 when all that there is to tell was told."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="llmops.sweep.follow")
    parser.add_argument("--study", required=True)
    parser.add_argument("--trial", required=True, type=int)
    parser.add_argument("--run", required=True)
    parser.add_argument("--submission", required=True, type=int)
    given = parser.parse_args(arguments)
    follower = Follower(given.study, given.trial, given.run, given.submission)
    over = threading.Event()
    threading.Thread(target=_wait_for_end, args=(over,), daemon=True).start()
    poll_s = POLL_S if "://" not in given.run or given.run.startswith("file:") else REMOTE_POLL_S
    complaints = Complaints()
    while not over.is_set():
        try:
            follower.look()
            complaints.hear(None)
        except (ClusterError, UserError, OSError) as error:
            complaints.hear(error)
        over.wait(max(poll_s, min(follower.cost / SHARE, SLOWEST_S)))
    return _finish(follower, remote=poll_s == REMOTE_POLL_S)


def _wait_for_end(over: threading.Event) -> None:
    while os.read(0, 1 << 16):
        pass
    over.set()
    watchdog = threading.Timer(END_S + 1.0, _give_up)  # a client library may not come back at all
    watchdog.daemon = True
    watchdog.start()


def _give_up() -> None:
    print(f"llmops: the study could not be told in {END_S:.0f} s how this trial ended", file=sys.stderr, flush=True)
    os._exit(1)


def _finish(follower: Follower, remote: bool) -> int:
    deadline = time.monotonic() + END_S
    output_due = time.monotonic() + FLUSH_S  # the last output of ranks reaches an object store after their supervisor
    while True:
        try:
            if remote and follower.study.record.sweep.objective.startswith(objective.LOG):
                time.sleep(max(0.0, output_due - time.monotonic()))
            follower.finish()
            return 0
        except (ClusterError, OSError) as error:
            if time.monotonic() + RETRY_S > deadline:
                print(f"llmops: the study was not told how this trial ended: {error}", file=sys.stderr, flush=True)
                return 1
            time.sleep(RETRY_S)
        except UserError as error:
            print(f"llmops: the study was not told how this trial ended: {error}", file=sys.stderr, flush=True)
            return 2


if __name__ == "__main__":
    sys.exit(main())
