"""``llmops doctor``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from llmops.errors import UserError

EPILOG = """examples:
  llmops doctor
  llmops doctor --backend slurm --runs-url /shared/runs
  llmops doctor --config-dir conf cluster=ours checkpoint.save_seconds=120
  llmops doctor --backend k8s --runs-url s3://my-bucket/runs --json
"""
MAX_S = 600.0


def configure(parser: argparse.ArgumentParser) -> None:
    """What is looked at, and how it is told."""
    parser.description = (
        "Say what works here, what is missing, and how to fix it. Exit code 1 when something is broken."
    )
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="of the run that is meant: cluster=ours …")
    parser.add_argument("--backend", metavar="B", help="local, slurm or k8s; default: all that seem to be here")
    parser.add_argument("--config-dir", metavar="DIR", type=Path, help="a folder with config groups of your own")
    parser.add_argument(
        "--timeout", metavar="S", type=float, default=60.0, help="seconds for each check (default: %(default)g)"
    )
    parser.add_argument("--json", action="store_true", help="one object, on stdout alone")


def run(arguments: argparse.Namespace) -> int:
    """Look at everything at once, and tell it. Exit code 1 when a check failed."""
    from rich.console import Console

    from llmops.sites import doctor, table

    if not 0 < arguments.timeout <= MAX_S:
        raise UserError(f"--timeout {arguments.timeout:g}: give seconds, more than 0 and at most {MAX_S:g}")
    with table.waiting() as tell:
        found = doctor.examine(
            arguments.overrides,
            arguments.config_dir,
            arguments.backend,
            arguments.runs_url,
            arguments.timeout,
            tell,
        )
    broken = any(check.result == "fail" for check in found)
    if arguments.json:
        print(json.dumps({"ok": not broken, "checks": [asdict(check) for check in found]}, indent=1))
    else:
        table.show(found, Console())
    return 1 if broken else 0
