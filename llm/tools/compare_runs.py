"""``python -m llm.tools.compare_runs A B``: were two runs, by path or URL, the same, bit by bit?

Compares loss, gradient norm and learning rate of every step that both have, as the metrics hold them (every bit), and
says what their newest checkpoints know of the machines. Exit code 0 when all is equal, 1 when not, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from llm.checkpoint.lineage import newest_commit, read_manifest
from llm.utils.reproducibility import differences
from llm.utils.storage import Storage, open_storage

COMPARED = ("loss", "grad_norm", "lr")


def main(argv: list[str] | None = None) -> int:
    """Print the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m llm.tools.compare_runs", description=__doc__)
    parser.add_argument("runs", nargs=2, metavar="RUN", help="run directory: a path or an fsspec URL")
    names = parser.parse_args(argv).runs
    stores = [open_storage(name) for name in names]
    try:
        a, b = (steps(store) for store in stores)
        records = [machine(store) for store in stores]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, found in zip(names, (a, b), strict=True):
        if not found:
            print(f"error: {name} has no metrics of steps: give the run directory itself", file=sys.stderr)
            return 2
    if None not in records:
        changes = differences(*(record or {} for record in records))
        print(f"machines: {', '.join(changes) or 'nothing that is recorded differs'}")
    common = sorted(a.keys() & b.keys())
    print(f"steps: {len(a)} and {len(b)}, {len(common)} in both")
    first = next((step for step in common if any(a[step].get(key) != b[step].get(key) for key in COMPARED)), None)
    if first is None and common:
        print(f"equal, bit by bit, in {', '.join(COMPARED)}")
        return 0
    if first is None:
        print("nothing to compare")
        return 1
    for key in COMPARED:
        if (one := a[first].get(key)) != (other := b[first].get(key)):
            print(f"step {first} is the first that differs: {key} {one!r} and {other!r}")
    last = common[-1]
    print(f"step {last}, the last in both: loss {a[last].get('loss')!r} and {b[last].get('loss')!r}")
    return 1


def steps(storage: Storage) -> dict[int, dict[str, Any]]:
    """Step -> its line of the metrics. Of a step that several attempts made, the newest attempt's."""
    found: dict[int, dict[str, Any]] = {}
    for attempt in storage.list("metrics"):
        for part in storage.list(f"metrics/{attempt}"):
            for text in storage.read(f"metrics/{attempt}/{part}").decode().splitlines(keepends=True):
                if not text.endswith("\n"):
                    continue  # it is being written
                line = json.loads(text)
                if line.get("kind") == "step":
                    found[line["step"]] = line
    return found


def machine(storage: Storage) -> dict[str, Any] | None:
    """What the newest checkpoint says of the machines that made it."""
    commit = newest_commit(storage)
    state = read_manifest(storage, commit).state if commit else {}
    found = state.get("made_by")
    return found if isinstance(found, dict) else None


if __name__ == "__main__":
    sys.exit(main())
