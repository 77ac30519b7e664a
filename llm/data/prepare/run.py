"""A preparation from the options to the index: on one machine, or as one of the ranks of a job."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from llm.data.format import Index
from llm.data.prepare import pool
from llm.data.prepare.inputs import Piece
from llm.data.prepare.merge import merge, tidy
from llm.data.prepare.meter import Meter
from llm.data.prepare.options import check
from llm.data.prepare.plan import claim, is_complete, make_plan, stored_plan, trained_name
from llm.data.prepare.pool import WorkError
from llm.data.prepare.records import Bad, Rows
from llm.data.prepare.stages import done, stages
from llm.data.prepare.unit import Job, load
from llm.train.control import Control
from llm.utils.config import ConfigError, PrepareConfig

PROBED = 100  # rows that must not all be bad
BEAT_S = 1.0
FIRST_POLL_S, POLL_S = 0.5, 15.0
MARGIN_S = 3.0  # before a deadline
PATIENCE_S = 20.0  # after a stop request without one; SLURM's KillWait is 30 s


class Stopped(Exception):
    """Asked to stop: what is done stays, and the next run goes on from there."""


class Watch:
    """Requests to stop, and heartbeats that say how many items this rank has done."""

    def __init__(self, rank: int = 0) -> None:
        self.control = Control(rank, os.environ.get("LLMOPS_CONTROL_DIR"))
        self.items = 0
        self.deadline: float | None = None
        self._beaten = 0.0
        self._phase = ""

    def asked(self) -> bool:
        """Also beats the heart."""
        self.beat(self._phase)
        asked = self.control.stop_requested()
        if asked and self.deadline is None:
            self.deadline = self._given_deadline()
        return asked

    def late(self) -> bool:
        """Is the deadline near?"""
        return self.deadline is not None and time.time() > self.deadline

    def beat(self, phase: str) -> None:
        """Say that this rank is at ``phase``."""
        now = time.monotonic()
        if phase != self._phase or now - self._beaten >= BEAT_S:
            self._phase, self._beaten = phase, now
            self.control.heartbeat(phase, self.items or None)

    def _given_deadline(self) -> float:
        if self.control.directory is not None:
            try:
                deadline = json.loads((self.control.directory / "stop").read_text())["deadline"]
                return float(deadline) - MARGIN_S
            except (OSError, ValueError, KeyError, TypeError):  # a file made by hand
                pass
        return time.time() + PATIENCE_S


@dataclass
class Runner:
    """One of ``world`` ranks, which does every ``world``-th item."""

    config: PrepareConfig
    watch: Watch
    rank: int = 0
    world: int = 1
    done_before: int = 0  # units
    done_now: int = 0

    def prepare(self) -> Index | None:
        """Do this rank's share; rank 0 returns the index.

        Raises ConfigError, DataError, WorkError, OSError, Stopped.
        """
        self.watch.beat("plan")
        job = plan_job(self.config)
        if self.rank:
            if self._wait_for_plan(job):
                return None
        else:
            index = claim(job.storage, job.plan, self.config.overwrite)
            if index is not None:
                self.done_before = len(job.plan.units)
                tidy(job)
                return index
        with Meter(quiet=self.rank > 0) as meter:
            for stage, count in stages(self.config, job.plan):
                self.do(job, stage, range(self.rank, count, self.world), meter)
                if self.rank == 0 or stage != "units":
                    self._wait_for_others(job, stage, count, meter)
        if self.rank:
            return None
        self.watch.beat("merge")
        index = merge(job)
        tidy(job)
        return index

    def do(self, job: Job, stage: str, items: Iterable[int], meter: Meter) -> None:
        """Do those of ``items`` that have no record yet."""
        before = done(job.storage, stage)
        items = list(items)
        missing = [item for item in items if item not in before]
        by_bytes = stage in ("hashes", "units")
        sizes = {item: job.plan.unit_bytes(item) if by_bytes else 1 for item in items}
        meter.begin(stage, sum(sizes.values()), sum(sizes[item] for item in items if item in before), not by_bytes)
        self.watch.beat(stage)
        if stage == "units":
            self.done_before = self.watch.items = len(items) - len(missing)
        for seen in pool.run(self.config, job.plan, stage, missing, workers(self.config), self.watch):
            meter.advance(seen.bytes if by_bytes else len(seen.done), seen.tokens)
            missing = [item for item in missing if item not in seen.done]
            if stage == "units":
                self.watch.items += len(seen.done)
                self.done_now += len(seen.done)
        if missing:
            raise Stopped

    def _wait_for_plan(self, job: Job) -> bool:
        """Until rank 0 has begun; is there nothing left to do?"""
        waiting = _Patience(self.watch, self.config.wait_s, "rank 0 has not begun this preparation")
        while not is_complete(job.storage, job.plan):
            if stored_plan(job.storage) == job.plan:
                return False
            waiting.more(0)
        return True

    def _wait_for_others(self, job: Job, stage: str, count: int, meter: Meter) -> None:
        if self.world == 1:
            return
        waiting = _Patience(self.watch, self.config.wait_s, f"no other rank has done anything of {stage}")
        while len(ready := done(job.storage, stage)) < count:
            waiting.more(len(ready))


class _Patience:
    """Waits in growing steps, and for ``limit_s`` in which nothing changes."""

    def __init__(self, watch: Watch, limit_s: float, what: str) -> None:
        self.watch, self.limit_s, self.what = watch, limit_s, what
        self.count, self.since, self.pause = -1, time.monotonic(), FIRST_POLL_S

    def more(self, count: int) -> None:
        """Wait once more; ``count`` is what has been reached. Raises Stopped, or WorkError at the limit."""
        now = time.monotonic()
        if count != self.count:
            self.count, self.since, self.pause = count, now, FIRST_POLL_S
        if now - self.since > self.limit_s:
            raise WorkError(f"{self.what} for prepare.wait_s={self.limit_s:g} s; run this again to go on")
        until = now + self.pause
        self.pause = min(self.pause * 1.5, POLL_S)
        while time.monotonic() < until:
            if self.watch.asked():
                raise Stopped
            time.sleep(min(0.2, self.pause))


def plan_job(config: PrepareConfig) -> Job:
    """Look at the options, the tokenizer and the input. Raises ConfigError."""
    check(config)
    trained = config.train_tokenizer is not None
    plan = make_plan(config, trained_name(config) if trained else load(config.tokenizer).sha256)
    job = Job(config, plan)
    if not trained:
        _ = job.dtype  # refuses one that is too narrow
    _probe(job)
    return job


def workers(config: PrepareConfig) -> int:
    """Processes on this machine: as many as its ranks may have cores."""
    if config.workers is not None:
        return config.workers
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


def _probe(job: Job) -> None:
    """Refuse at once where every one of the first rows is bad: a wrong field would be found only hours later."""
    if not job.plan.units:
        return
    piece: Piece = job.plan.units[0][0]
    file = job.plan.files[piece.file]
    rows = list(islice(Rows(job.config).of(file, piece, lambda _: None), PROBED))
    causes = [(line, row.cause) for line, row in rows if isinstance(row, Bad)]
    if rows and len(causes) == len(rows) and job.config.max_bad_fraction < 1:
        line, cause = causes[0]
        raise ConfigError(
            f"{file.url}:{line}: {cause}; none of the first {len(rows)} lines is a document: see prepare.field, "
            "prepare.chat and prepare.format"
        )
