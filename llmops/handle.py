"""A run in the hands of a Python program or a notebook."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from llmops import api, studies
from llmops.api import Status
from llmops.errors import ClusterError, RunFailed, UserError
from llmops.runs import records
from llmops.runs.model import Run as RunDirectory
from llmops.runs.store import Store, open_store

if TYPE_CHECKING:
    from llmops.sweep.model import TrialRow

T = TypeVar("T")

ASK_S = 10.0  # how often a scheduler is asked while somebody waits; the run store is looked at all the time
LOOK_S, LOOK_MAX_S = 0.1, 2.0  # between two looks at the run store; a folder is looked at more often
FOLDER_MAX_S = 0.5
ROWS_S = 1.0  # for which what was seen of a study serves all of its elements
OUTAGE_S = 300.0  # for which a store that does not answer is borne while somebody waits

_ROWS: dict[str, tuple[float, dict[int, TrialRow]]] = {}  # by study: when they were read, and the rows by number


class Run(Generic[T]):
    """A run, and what its function returns, where it calls one; of other runs the result is ``None``.

    It holds nothing but the run's address: it may be dropped, pickled, or made again by :func:`llmops.find`, and the
    run does not care. All methods may be called from any thread; none installs a signal handler or touches an event
    loop, and an interrupt (Ctrl-C, a notebook's stop button) ends the wait, not the run.
    """

    def __init__(self, url: str, *, calls: bool = False) -> None:
        """``calls``: it is known to call a function; otherwise the run directory is asked."""
        self.url, self._calls = url, calls

    @property
    def id(self) -> str:
        """The run's id, which the command line takes as well."""
        return self.url.rstrip("/").rsplit("/", 1)[-1]

    @property
    def name(self) -> str:
        """The run's name."""
        return self._read().name

    @property
    def job_id(self) -> str | None:
        """The scheduler's id of the newest job; ``12345_7`` for an element of a SLURM array that has begun."""
        return self._read().job_id

    @property
    def _store(self) -> Store:
        return open_store(self.url)

    def _read(self) -> RunDirectory:
        return records.load_run(self._store)

    def status(self) -> Status:
        """The state, read anew: ``state`` is pending, running, preempted, finished, failed, cancelled or unknown.

        ``reason`` says why in words, and ``run`` is all that the run directory holds. Asks the scheduler once, unless
        the run is over; of the runs of one :func:`llmops.map`, once a second for all of them together.
        """
        run = self._read()
        element = self._element()
        return api.status(run) if element is None or api.over_for_good(run) else self._of_many(run, *element)

    def describe(self) -> dict[str, Any]:
        """The run as ``llmops status --json`` has it: step, loss, goodput, host, error and more."""
        return api.describe([self.status()])[0]

    def done(self) -> bool:
        """Whether nothing follows any more; it may have failed."""
        return _is_over(self.status())

    def wait(self, timeout: float | None = None, *, progress: bool | None = None) -> Status:
        """Block until the run is over, whatever way it ended; the state then.

        ``timeout``: seconds, after which :class:`TimeoutError` is raised and the run goes on. ``progress``: show how it
        goes meanwhile; None does so in notebooks and on terminals. In a coroutine: ``asyncio.to_thread(run.wait)``.
        """
        from llmops.display import shown

        deadline = None if timeout is None else time.monotonic() + timeout
        with shown(self.id, progress) as show:
            return self._follow(deadline, timeout, show)

    def _follow(self, deadline: float | None, timeout: float | None, show: Any) -> Status:
        latest, asked, pause, answered = None, 0.0, LOOK_S, time.monotonic()
        seen: tuple[int, ...] = ()
        looks = 0
        while True:
            try:
                run = self._read()
                marks = (len(run.submissions), len(run.attempts), sum(each.end is not None for each in run.attempts))
                if latest is None or marks != seen or time.monotonic() - asked > ASK_S:
                    latest, seen, asked, pause = self.status(), marks, time.monotonic(), LOOK_S
                    if _is_over(latest):
                        if looks:  # what was shown must not stay what it was
                            show(latest)
                        return latest
                looks += 1
                show(Status(run, latest.state, latest.reason, latest.job))
                answered = time.monotonic()
            except ClusterError:
                if time.monotonic() - answered > OUTAGE_S:
                    raise
            left = pause if deadline is None else deadline - time.monotonic()
            if left <= 0:
                known = latest.state if latest else "unknown"
                raise TimeoutError(f"{self.id} is {known} after {timeout:g} s; it goes on")
            time.sleep(min(pause, left))
            pause = min(1.5 * pause, FOLDER_MAX_S if self._store.local_path else LOOK_MAX_S)

    def logs(
        self, *, rank: int | None = None, attempt: int | None = None, tail: int | None = None, follow: bool = False
    ) -> Iterator[str]:
        """What the ranks printed, line by line, merged by time; None takes all ranks and attempts.

        ``tail``: the last so many lines of each rank. ``follow``: also what comes, until the run is over.
        """
        from llmops.monitor import logs

        if not follow:
            return (line.text for line in logs.tail(self._read(), rank, attempt, tail))
        asked = time.monotonic()

        def over() -> bool:
            nonlocal asked
            if not api.has_ended(self._read()) and time.monotonic() - asked < ASK_S:
                return False
            asked = time.monotonic()
            return self.done()

        return (line.text for line in logs.follow(self._read(), over, rank, attempt, tail))

    def metrics(self) -> list[dict[str, Any]]:
        """What the trainer wrote of each step that counts, once and in order: ``step``, ``loss`` and more.

        Steps that were run again after a preemption are there once. ``pandas.DataFrame(run.metrics())`` is a table.
        """
        from llmops.runs.lineage import merged_metrics

        return list(merged_metrics(self._read()))

    def cancel(self, *, graceful: bool = False, wait: bool = True) -> Status:
        """End the run for good; ``graceful`` lets it save first. ``wait``: until its job is gone."""
        element = self._element()
        if element is not None:
            ref = f"{element[0]}/{element[1]}"
            root = records.root_of(self.url)
            if studies.is_waiting(ref, root):
                studies.cancel_waiting(ref, root)
                _ROWS.clear()
                return self.status()
        return api.cancel(self._read(), graceful, wait)

    def resume(
        self, overrides: Sequence[str] = (), *, backend: str | None = None, config_dir: str | Path | None = None
    ) -> Run[T]:
        """Go on with a new job from what was saved last, with changed settings or on another cluster if wanted.

        Nothing happens where the run has finished and nothing is changed. Raises :class:`llmops.UserError` while it is
        alive.
        """
        api.resume(self._read(), overrides, backend, None if config_dir is None else Path(config_dir))
        return self

    def result(self, timeout: float | None = None, *, rank: int = 0) -> T:
        """Wait, and return what the function returned on ``rank``; ``None`` of a run that calls none.

        Raises what the function raised, with the traceback of there as its cause; :class:`llmops.RunFailed` where the
        run failed or was cancelled without that; :class:`TimeoutError` after ``timeout`` seconds.

        What comes back is unpickled only if it was signed with this user's own key for this run, attempt and rank: who
        can write to the run store, but not read the key in the user's home, cannot make this call run anything.
        """
        from llmops.functions import call

        ended = self.wait(timeout)
        run = self._read()
        if self._calls or call.is_call(run):
            value: T = call.returned(run, rank, ended.state, ended.reason)
            return value
        if ended.state != "finished":
            error = run.newest.end.error if run.newest and run.newest.end else None
            raise RunFailed(f"{self.id} {ended.state}: {ended.reason}" + (f"\n{error}" if error else ""))
        return None  # type: ignore[return-value]  # of such a run, T is None

    def exception(self, timeout: float | None = None) -> Exception | None:
        """What :meth:`result` would raise, or None. Still raises :class:`TimeoutError`."""
        self.wait(timeout)
        try:
            self.result()
        except Exception as error:  # whatever the function raised is the answer
            if isinstance(error, ClusterError | UserError) and error.__cause__ is None:
                raise  # it is not known
            return error
        return None

    def _element(self) -> tuple[str, int] | None:
        """Study and number, where this run is one of many."""
        study, dot, number = self.id.rpartition(".")
        return (study, int(number)) if dot and number.isdigit() else None

    def _of_many(self, run: RunDirectory, study: str, number: int) -> Status:
        """Of an element that is not over, or has not begun: what is known of all of its study."""
        taken, rows = _ROWS.get(study, (0.0, {}))
        if time.monotonic() - taken > ROWS_S:
            found = studies.trials(studies.find(study, records.root_of(self.url)))
            rows = {row.trial: row for row in found}
            _ROWS[study] = time.monotonic(), rows
        if number not in rows:
            raise UserError(f"{study} has no element {number}")
        row = rows[number]
        state = {"complete": "finished", "timeout": "failed"}.get(row.state, row.state)
        return Status(run, state, row.reason, None)

    def __repr__(self) -> str:
        return f"Run({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def _repr_html_(self) -> str:
        """For notebooks: the run as it is now."""
        from llmops.display import html

        try:
            return html(self.status())
        except (ClusterError, UserError) as error:
            from html import escape

            return f"<code>{escape(repr(self))}</code>: {escape(str(error))}"


def _is_over(status: Status) -> bool:
    return status.state in api.OVER or api.over_for_good(status.run)
