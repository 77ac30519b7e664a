"""``llmops sweep``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llmops import studies
from llmops.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    """What is swept, where, and how many trials at a time."""
    parser.usage = (
        "llmops sweep [OVERRIDE …] [options] [-- COMMAND …]\n       llmops sweep status|report|best|resume STUDY"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE", help="train.lr=1e-4,3e-4 'train.seed=range(0,8)' sweep=tpe …"
    )
    parser.add_argument("--backend", metavar="B", help="local, slurm or k8s (the same as cluster=B)")
    parser.add_argument("--name", metavar="N", help="the study's name")
    parser.add_argument("--config-dir", metavar="DIR", type=Path, help="a folder with config groups of your own")
    parser.add_argument("--trials", metavar="N", type=int, help="how many trials (the same as sweep.trials=N)")
    parser.add_argument("--max-parallel", metavar="P", type=int, help="trials at a time (sweep.max_parallel=P)")
    output = parser.add_mutually_exclusive_group()  # what is on stdout
    output.add_argument("--dry-run", action="store_true", help="print what would be submitted, and submit nothing")
    output.add_argument("--json", action="store_true", help="print the study as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Submit the study and say what was submitted."""
    verbless = next((word for word in arguments.overrides if "=" not in word and not word.startswith("~")), None)
    if verbless is not None:
        raise UserError(f"sweep {verbless}: neither an override (key=value) nor one of status, report, best, resume")
    prepared = studies.prepare(
        arguments.overrides,
        backend=arguments.backend,
        name=arguments.name,
        command=arguments.command,
        config_dir=arguments.config_dir,
        runs_url=arguments.runs_url,
        trials=arguments.trials,
        max_parallel=arguments.max_parallel,
    )
    count = prepared.record.trials
    if arguments.dry_run:
        print(studies.dry_run(prepared), end="")
        print(f"# {count} trials of {len(prepared.record.axes)} keys; nothing was submitted")
        return 0
    study = studies.start(prepared)
    jobs = ", ".join(each.job_id for each in study.submissions if each.job_id)
    if arguments.json:
        print(json.dumps({"id": study.id, "url": study.url, "trials": count, "job_ids": jobs.split(", ")}, indent=1))
        return 0
    print(f"submitted {study.id}: {count} trials ({study.record.backend} job {jobs})")
    print(f"  in      {study.url}")
    print(f"  watch   llmops sweep status {study.id}")
    print(f"  compare llmops sweep report {study.id}", flush=True)
    return 0
