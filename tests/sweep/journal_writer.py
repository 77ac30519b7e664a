"""A process that appends to a journal and says which appends it knows to be there: ``URL NAME FIRST COUNT``."""

from __future__ import annotations

import sys

from llmops.runs.store import open_store
from llmops.sweep.journal import StoreJournal


def main(url: str, name: str, first: str, count: str) -> None:
    journal = StoreJournal(open_store(url))
    for number in range(int(first), int(first) + int(count)):
        journal.append_logs([{"writer": name, "number": number, "part": part} for part in (0, 1)])
        print(number, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
