"""``llmops ckpt import`` and ``export``. Tensors need torch, so that a process of its own does the work."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from llmops import api
from llmops.checkpoints.survey import Survey
from llmops.checkpoints.target import resolve
from llmops.errors import UserError
from llmops.runs.records import load_run
from llmops.runs.store import open_store

HERE = str(Path(__file__).parents[2])
CLEAN_UP_S = 60.0  # what is half done has to be removed from a store


def run(arguments: argparse.Namespace) -> int:
    """Convert; returns what the converter returns."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"{arguments.action} needs torch, which is not installed here: pip install 'llmops[train]'")
    return _convert(_import(arguments) if arguments.action == "import" else _export(arguments))


def _import(arguments: argparse.Namespace) -> list[str]:
    """Not into a run that is alive: the next attempt would go on from what was imported, and not from its own work."""
    ref = arguments.ref
    run = load_run(open_store(ref)) if "/" in ref or ref in (".", "..") else api.find(ref, arguments.runs_url)
    if run.record is not None and (state := api.status(run).state) not in api.OVER:
        raise UserError(f"{run.id} is {state}: cancel it first, or import into a folder of its own")
    words = ["import", "--map", arguments.map]
    words += [] if arguments.step is None else ["--step", str(arguments.step)]
    words += [] if arguments.heads is None else ["--heads", str(arguments.heads)]
    words += ["--skip-unreadable"] if arguments.skip_unreadable else []
    return [*words, "--", arguments.source, run.url]


def _export(arguments: argparse.Namespace) -> list[str]:
    target = resolve(arguments.ref, arguments.runs_url)
    entry = Survey(target).choose(target.selector)
    words = ["export", "--format", arguments.format, "--commit", entry.commit.path]
    words += [word for prefix in arguments.only or () for word in ("--only", prefix)]
    words += ["--dtype", arguments.dtype] if arguments.dtype else []
    return [*words, "--", target.url, arguments.target]


def _convert(words: list[str]) -> int:
    """Its progress, results and errors go where ours go. Ctrl-C reaches it too, and it removes what is half done."""
    # -P: whatever lies in the working directory is not part of the program.
    command = [sys.executable, "-P", "-m", "llm.tools.convert", "--prog", "llmops", *words]
    for word in words:
        if word.startswith("ssh://"):
            raise UserError(f"{word}: checkpoints are converted where they are; run this on that host")
    path = os.pathsep.join(filter(None, (HERE, os.environ.get("PYTHONPATH"))))
    sys.stdout.flush()
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            try:
                process.wait(CLEAN_UP_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
