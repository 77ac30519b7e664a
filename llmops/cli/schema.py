"""``llmops schema``."""

from __future__ import annotations

import argparse
from pathlib import Path

from llmops.errors import UserError
from llmops.suggest import hint


def configure(parser: argparse.ArgumentParser) -> None:
    """Of which file, and where to."""
    parser.add_argument(
        "kind", nargs="?", metavar="KIND", help="config, recipe, a group such as model, or run: a run's config.yaml"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="write it there instead of printing it")
    parser.add_argument("--all", metavar="DIR", type=Path, help="write those of all kinds into a folder")


def run(arguments: argparse.Namespace) -> int:
    """Print or write schemas."""
    from llmops.config import json_schema

    kind, known = arguments.kind or json_schema.RUN, json_schema.names()
    if kind not in known:
        raise UserError(f"schema {kind}: choose one of {', '.join(known)}{hint(kind, known)}")
    if arguments.all is not None and (arguments.kind or arguments.output):
        raise UserError("--all writes every kind: leave KIND and --output out")
    try:
        if arguments.all is not None:
            paths = json_schema.write_all(arguments.all)
            print(f"wrote into {arguments.all}: {', '.join(path.name for path in paths)}")
        elif arguments.output is not None:
            arguments.output.write_text(json_schema.text(kind), encoding="utf-8")
            print(f"wrote {arguments.output}")
        else:
            print(json_schema.text(kind), end="")
    except OSError as error:
        if error.filename is None:  # of stdout
            raise
        raise UserError(f"{error.filename}: cannot be written: {error.strerror}; give another place") from error
    return 0
