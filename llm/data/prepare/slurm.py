"""A preparation as arrays of SLURM jobs, by submitit: element n of N does the items n, n + N, … of a stage.

What is done is known from the records alone, so an element that was preempted or lost is done again by whoever runs
next: submitit's requeue, or the same command.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import msgspec
import submitit

from llm.data.format import Index
from llm.data.prepare.merge import merge, tidy
from llm.data.prepare.meter import Meter
from llm.data.prepare.plan import claim, make_plan
from llm.data.prepare.pool import WorkError
from llm.data.prepare.run import Runner, Stopped, Watch, plan_job
from llm.data.prepare.stages import done, stages
from llm.data.prepare.unit import Job
from llm.utils.config import PrepareConfig

POLL_S = 2.0
LOG_CHARS = 500


@dataclass
class Element:
    """What a job of the array runs."""

    config: dict[str, Any]
    tokenizer: str
    stage: str
    jobs: int
    workers: int

    def __call__(self, number: int) -> int:
        """Do the items of element ``number``; how many they were."""
        config = msgspec.convert({**self.config, "workers": self.workers}, PrepareConfig)
        job = Job(config, make_plan(config, self.tokenizer))
        runner = Runner(config, Watch())
        count = dict(stages(config, job.plan))[self.stage]
        with Meter() as meter:
            runner.do(job, self.stage, range(number, count, self.jobs), meter)
        return runner.done_now

    def checkpoint(self, number: int) -> Any:
        """How submitit has it go on when it is preempted or out of time: the records say from where."""
        return submitit.helpers.DelayedSubmission(self, number)


def submit(
    runner: Runner,
    jobs: int,
    partition: str | None,
    account: str | None,
    cpus: int,
    mem: str | None,
    minutes: int,
    wait_hours: int,
    logs: str,
) -> Index:
    """Prepare by arrays of at most ``jobs`` jobs, wait for them, and merge what they have made.

    Raises ConfigError, WorkError, DataError, OSError, Stopped.
    """
    job = plan_job(runner.config)
    index = claim(job.storage, job.plan, runner.config.overwrite)
    if index is not None:
        runner.done_before = len(job.plan.units)
        tidy(job)
        return index
    executor = submitit.AutoExecutor(folder=logs, cluster="slurm")
    options = {"slurm_partition": partition, "slurm_account": account, "slurm_mem": mem}
    executor.update_parameters(
        name="prepare_data",
        cpus_per_task=cpus,
        timeout_min=minutes,
        slurm_array_parallelism=jobs,
        **{name: value for name, value in options.items() if value is not None},
    )
    until = time.monotonic() + 3600.0 * wait_hours
    with Meter() as meter:
        for stage, count in stages(runner.config, job.plan):
            before = done(job.storage, stage)
            missing = [item for item in range(count) if item not in before]
            if stage == "units":
                runner.done_before, runner.done_now = count - len(missing), len(missing)
            if not missing:
                continue
            options = msgspec.to_builtins(runner.config)
            element = Element(options, job.plan.tokenizer, stage, jobs, runner.config.workers or cpus)
            array = executor.map_array(element, sorted({item % jobs for item in missing}))
            meter.begin(f"{stage} in job {array[0].job_id.partition('_')[0]}", count, count - len(missing), items=True)
            try:
                _wait(runner, job, stage, count, array, meter, until)
            except BaseException:
                for each in array:
                    each.cancel()
                raise
    index = merge(job)
    tidy(job)
    return index


def _wait(runner: Runner, job: Job, stage: str, count: int, array: list[Any], meter: Meter, until: float) -> None:
    """Until every item of the stage has its record, or no element is left that could make it."""
    known = len(done(job.storage, stage))
    while True:
        over = all(each.done() for each in array)
        found = len(done(job.storage, stage))
        meter.advance(found - known, 0)
        known = found
        if found == count and over:
            return
        if over:
            raise WorkError(
                f"{count - found} of {count} items of {stage} are missing and all jobs are over: {_last_words(array)}; "
                "the same command does what is missing"
            )
        if time.monotonic() > until:
            raise WorkError(f"{count - found} of {count} items of {stage} are missing after --slurm-wait-hours")
        runner.watch.items = found
        if runner.watch.asked():
            raise Stopped
        time.sleep(POLL_S)


def _last_words(array: list[Any]) -> str:
    """What the first element that failed has said."""
    for each in array:
        if each.state not in ("COMPLETED", "UNKNOWN") or not each.paths.result_pickle.exists():
            text = " ".join((each.stderr() or "").split())
            return f"{each.job_id} is {each.state}: …{text[-LOG_CHARS:]}"
        error = each.exception()
        if error is not None:
            return f"{each.job_id}: {' '.join(str(error).split())[-LOG_CHARS:]}"
    return "no job says why"
