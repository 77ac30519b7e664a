"""``llmops submit``."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmops import api
from llmops.launch import Prepared, dry_run
from llmops.runs.model import Run


def configure(parser: argparse.ArgumentParser, rendering: bool = False) -> None:
    """Arguments of ``submit`` and, but for what needs a job, of ``render``."""
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra overrides: recipe=tiny train.lr=1e-4 …")
    parser.add_argument("--backend", metavar="B", help="local, slurm, k8s or torchx (the same as cluster=B)")
    parser.add_argument(
        "-o",
        "--option",
        action="append",
        default=[],
        metavar="K=V",
        help="cluster.K=V; with --backend torchx also an option of its scheduler",
    )
    parser.add_argument("--name", metavar="N", help="the run's name")
    parser.add_argument("--config-dir", metavar="DIR", type=Path, help="a folder with config groups of your own")
    if rendering:
        return
    parser.usage = "llmops submit [OVERRIDE …] [options] [-- COMMAND …]"
    output = parser.add_mutually_exclusive_group()  # what is on stdout
    output.add_argument("--dry-run", action="store_true", help="print what would be submitted, and submit nothing")
    output.add_argument("-f", "--follow", action="store_true", help="show the output until the run is over")
    output.add_argument("--json", action="store_true", help="print the run as JSON")


def prepare(arguments: argparse.Namespace) -> Prepared:
    """Everything up to, but without, writing and submitting."""
    return api.prepare(
        [*arguments.overrides, *api.cluster_options(arguments.option, arguments.backend)],
        backend=arguments.backend,
        name=arguments.name,
        command=arguments.command,
        config_dir=arguments.config_dir,
        runs_url=arguments.runs_url,
    )


def run(arguments: argparse.Namespace) -> int:
    """Submit, say what was submitted, and follow it if asked to."""
    prepared = prepare(arguments)
    if arguments.dry_run:
        print(dry_run(prepared), end="")
        return 0
    scored = prepared.config.eval.every == "commit"
    evaluation = f"{prepared.name}-eval" if scored else None
    return show(api.submit(prepared), arguments, evaluation, prepared.config.task == "serve")


def show(submitted: Run, arguments: argparse.Namespace, evaluation: str | None = None, serves: bool = False) -> int:
    """Say what was submitted, with the run that evaluates it or where it is reached, and follow it if asked to."""
    if arguments.json:
        import json

        print(json.dumps(api.describe([api.status(submitted)])[0], indent=1))
    else:
        print(f"submitted {submitted.id} ({submitted.backend} job {submitted.job_id})")
        print(f"  in      {submitted.url}")
        print(f"  follow  llmops logs -f {submitted.id}", flush=True)
        if serves:
            print(f"  reach   llmops status {submitted.id} tells the address once it serves", flush=True)
        if evaluation is not None:
            print(f"  scores  llmops status {submitted.id}; they are made by {evaluation}", flush=True)
    if arguments.follow:
        from llmops.cli.logs import follow

        return follow(submitted)
    return 0
