"""``python -m llmops.sweep.trial``: make the run of a trial, inside its own job. Run again, it finds what is there.

Prints one JSON object: ``submission`` of the run and ``params``. Exit code 2 for what no later attempt would change, 1
for what may be better then.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

import msgspec

from llmops import __version__, backends, launch
from llmops.config.compose import Composed
from llmops.config.recompose import recompose
from llmops.errors import ClusterError, UserError
from llmops.runs import records as runs
from llmops.runs.model import RunRecord, SubmissionRecord
from llmops.runs.store import Store, open_store
from llmops.sweep import compose, points, records
from llmops.sweep.model import Changes, Result
from llmops.sweep.optimizer import Optimizer, needed

TRIES = 100  # to claim a number; each loss is another process that makes the same trial


def make(study: records.Study, submission: int, trial: int) -> dict[str, Any]:
    """The trial's run, with a submission that belongs to ``submission`` of the study.

    Raises :class:`UserError` for a point that no run can be at, after recording that as the trial's result.
    """
    store = study.trial_store(trial)
    before = runs.load_run(store).record
    if before is not None:  # as it was, whatever was changed since
        composed = recompose(store.get("config.yaml").decode())
        return _prepared(study, store, submission, trial, _ask(study, trial, before.params), composed)
    changes = records.load_changes(study.store, submission)
    if changes is None:
        bases = compose.Bases.from_bytes(study.store.get("bases.json"))
        changes = Changes(axes=study.record.axes, first=0, bases=bases.found)
    study = dataclasses.replace(study, record=msgspec.structs.replace(study.record, axes=changes.axes))
    params = _ask(study, trial, points.point(changes.axes, study.record.sweep, trial - changes.first))
    try:
        composed = compose.Bases(changes.bases).config(changes.axes, params)
    except UserError as error:
        reason = str(error)
        failed = Result(trial=trial, outcome="failed", time=time.time(), reason=reason, params=params)
        records.write_result(study.store, failed)
        if needed(study.record.sweep):
            Optimizer.open(study).tell(failed)
        raise
    _write_run(study, store, trial, params, composed)
    return _prepared(study, store, submission, trial, params, composed)


def _prepared(
    study: records.Study, store: Store, submission: int, trial: int, params: dict[str, Any], composed: Composed
) -> dict[str, Any]:
    return {"submission": _submission(study, store, submission, trial, composed), "params": params}


def _ask(study: records.Study, trial: int, fixed: dict[str, Any] | None) -> dict[str, Any]:
    """The trial's point; its sampler learns of it, where there is one."""
    if needed(study.record.sweep):
        return Optimizer.open(study).ask(trial, fixed)
    assert fixed is not None, "without a sampler that learns, numbers alone decide"
    return fixed


def _write_run(study: records.Study, store: Store, trial: int, params: dict[str, Any], composed: Composed) -> None:
    """Each object once: whoever makes the same trial beside this process writes the same."""
    record, config = study.record, composed.config
    store.create("config.yaml", compose.text(composed).encode())
    made = RunRecord(
        id=runs.trial_id(study.id, trial),
        name=f"{study.record.name}/{trial}",
        owner=record.owner,
        host=record.host,
        created=time.time(),
        backend=record.backend,
        kind=record.kind,
        command=list(config.command),
        nodes=record.nodes,
        ranks_per_node=record.ranks_per_node,
        max_steps=None if config.command else config.train.max_steps,
        code=record.code,
        parent=study.id,
        params=params,
        version=__version__,
    )
    runs.write_run(store, made)


def _submission(study: records.Study, store: Store, submission: int, trial: int, composed: Composed) -> int:
    """The run's newest submission for this one of the study; made where there is none."""
    for _ in range(TRIES):
        mine = [each for each in runs.load_run(store).submissions if each.record.study_submission == submission]
        if mine:
            _write_spec(study, store, mine[-1].record, trial, composed)
            return mine[-1].number
        number = runs.next_submission(store)
        tag = launch.new_tag(runs.trial_id(study.id, trial), number)
        now = time.time()
        login = next((each.record.login for each in study.submissions if each.number == submission), None)
        record = SubmissionRecord(
            number=number,
            tag=tag,
            backend=study.record.backend,
            created=now,
            study_submission=submission,
            login=login,
        )
        runs.write_submission(store, record)
    raise ClusterError(f"{store.url}: no submission could be claimed in {TRIES} tries")


def _write_spec(study: records.Study, store: Store, record: SubmissionRecord, trial: int, composed: Composed) -> None:
    """What the supervisor runs: the array's spec with what this trial has of its own."""
    spec = launch.stored_spec(study.store, record.study_submission or 0)
    if spec is None:
        raise UserError(f"{study.url}/job/{record.study_submission:04d}/spec.json is missing or damaged")
    command = list(composed.config.command)
    if not command:
        command = [*spec["command"][:-1], f"{store.url}/config.yaml"]
    options = dict(spec["options"])
    if "job_id" in options:  # where jobs are named before they are made, elements are too
        index = runs.unpack(spec["array"]["trials"]).index(trial)
        options["job_id"] = backends.load(spec["backend"]).element(options["job_id"], index)
    own = {
        "run_id": runs.trial_id(study.id, trial),
        "name": f"{study.record.name}/{trial}",
        "submission": record.number,
        "tag": record.tag,
        "run_url": store.url,
        "command": command,
        "env": dict(composed.config.env),
        "threads_per_rank": composed.config.train.threads_per_rank,
        "options": options,
        "array": None,
        "study": {"url": study.url, "trial": trial, "submission": record.study_submission},
    }
    data = json.dumps({**spec, **own}, indent=1, sort_keys=True).encode()
    store.create(f"job/{record.number:04d}/spec.json", data)


def main(argv: list[str]) -> int:
    """Parse, make and print."""
    parser = argparse.ArgumentParser(prog="python -m llmops.sweep.trial", description="Make the run of a trial.")
    parser.add_argument("--study", required=True, help="the study's directory: a path or a URL")
    parser.add_argument("--submission", type=int, required=True, help="of the study")
    parser.add_argument("--trial", type=int, required=True)
    arguments = parser.parse_args(argv)
    try:
        study = records.load_study(open_store(arguments.study), with_results=False)
        answer = make(study, arguments.submission, arguments.trial)
    except (UserError, ClusterError) as error:
        print(f"llmops: trial {arguments.trial}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    print(msgspec.json.encode(answer).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
