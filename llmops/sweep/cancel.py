"""Ending a study, or a trial of it that has not begun. What is asked for is recorded before anything is told."""

from __future__ import annotations

import getpass
import time

from llmops import backends
from llmops.runs import records as runs
from llmops.sweep import records
from llmops.sweep.status import elements


def cancel_study(study: records.Study, graceful: bool, live: dict[int, str]) -> None:
    """Nothing of the study starts any more, and what runs ends. ``live``: job ids of trials that may be running."""
    by = getpass.getuser()
    for submission in study.submissions:
        if not submission.failed:
            runs.write_intent(study.store, submission.number, graceful, by)
    begun = {int(name.rsplit(".", 1)[1]) for name in study.store.list("trials") if name.rsplit(".", 1)[-1].isdigit()}
    for trial in {*live, *(begun - set(study.results))}:  # also those whose job has not come to their first attempt
        run = records.load_trial(study, trial)
        if run.submissions:
            runs.write_intent(run.store, run.submissions[-1].number, graceful, by)
    for name in {submission.scheduler for submission in study.submissions}:
        whole = [each.job_id for each in study.submissions if each.scheduler == name and each.job_id]
        backend = backends.load(name)
        if name == "k8s":  # where the pods of what is deleted end as their runs' intents say
            backend.cancel(list(dict.fromkeys([*live.values(), *filter(None, whole)])), graceful)
            continue
        if live and (graceful or name == "local"):
            # A signal to each that runs; what an array has not started ends with it, below.
            backend.cancel(list(live.values()), graceful)
        if not (graceful and live):
            backend.cancel(whole, graceful=False)
        elif name != "local":
            waiting = [element.job_id for trial, element in elements(study).items() if trial not in live]
            backend.cancel([job_id for job_id in waiting if job_id], graceful=False)


def cancel_waiting(study: records.Study, trial: int) -> None:
    """A trial that has not begun never will."""
    element = elements(study)[trial]
    path = f"{records.cancelled_folder(element.submission.number)}/{trial:04d}.json"
    study.store.create(path, runs.encode({"by": getpass.getuser(), "time": time.time()}))
    if element.job_id and element.submission.backend != "local":
        backends.load(element.submission.scheduler).cancel([element.job_id], graceful=False)
