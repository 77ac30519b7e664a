"""``python -m llm.tools.merge_traces RUN [--attempt N] [--output FILE]``: the phase traces of all ranks in one file.

Open it at ui.perfetto.dev or chrome://tracing: a row for each rank. On the terminal, the slowest ranks of each part.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from llm.utils.storage import Storage, open_storage


def main(argv: list[str] | None = None) -> int:
    """Write the file and print the table; returns the exit code: 2 where there are no traces."""
    parser = argparse.ArgumentParser(prog="python -m llm.tools.merge_traces", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="run directory: a path or an fsspec URL")
    parser.add_argument("--attempt", type=int, metavar="N", help="default: the newest one that has traces")
    parser.add_argument("--output", type=Path, default=Path("trace.json"), metavar="FILE", help="default: trace.json")
    arguments = parser.parse_args(argv)
    storage = open_storage(arguments.run)
    try:
        attempts = storage.list("traces")
        attempt = f"{arguments.attempt:04d}" if arguments.attempt is not None else max(attempts, default="")
        if attempt not in attempts:
            print(f"error: {arguments.run} has no traces: run it with logging.trace=true", file=sys.stderr)
            return 2
        found = events(storage, f"traces/{attempt}")
        arguments.output.write_text(json.dumps({"traceEvents": found}))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.output}: {len(found)} events")
    for name, by_rank in slowest(found).items():
        middle = median(by_rank.values())
        worst = sorted(by_rank.items(), key=lambda item: -item[1])[:3]
        ranks = ", ".join(f"rank {rank} {seconds * 1e3:.1f}" for rank, seconds in worst)
        print(f"{name:<12} median of ranks {middle * 1e3:8.1f} ms; slowest: {ranks}")
    return 0


def events(storage: Storage, folder: str) -> list[dict[str, Any]]:
    """Those of all segments of all ranks."""
    return [
        event for name in storage.list(folder) for event in json.loads(storage.read(f"{folder}/{name}"))["traceEvents"]
    ]


def slowest(found: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Part -> rank -> the median of its durations, in seconds."""
    durations: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event in found:
        if event["ph"] == "X":
            durations[event["name"]][event["pid"]].append(event["dur"] / 1e6)
    return {name: {rank: median(values) for rank, values in ranks.items()} for name, ranks in durations.items()}


if __name__ == "__main__":
    sys.exit(main())
