"""``python agent.pyz local|slurm|k8s|node``: the supervisor's entry points."""

from __future__ import annotations

import argparse
import os
import sys

from llmops.agent.rundir import StoreError, open_rundir


def main(argv: list[str]) -> int:
    """Parse and dispatch."""
    parser = argparse.ArgumentParser(prog="agent.pyz", description="The supervisor inside an llmops job.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for backend in ("local", "slurm", "k8s"):
        verb = verbs.add_parser(backend, help=f"supervise a job of the {backend} backend")
        verb.add_argument("--run", required=True, help="run directory: a path or a URL")
        verb.add_argument("--submission", type=int, required=True)
    node = verbs.add_parser("node", help="run the ranks of one node (started by the supervisor)")
    node.add_argument("--node", type=int, default=None, help="index of this node; default: SLURM_NODEID")
    arguments = parser.parse_args(argv)
    if arguments.verb == "node":
        from llmops.agent.node import main as run_node

        index = arguments.node if arguments.node is not None else int(os.environ["SLURM_NODEID"])
        return run_node(index)
    if arguments.verb == "slurm":
        from llmops.agent.slurm import main as supervise
    elif arguments.verb == "k8s":
        from llmops.agent.k8s import main as supervise
    else:
        from llmops.agent.local import main as supervise
    try:
        return supervise(open_rundir(arguments.run), arguments.submission)
    except (StoreError, ValueError, FileNotFoundError) as error:
        # A damaged or missing record: guessing would be worse than stopping.
        print(f"llmops: the supervisor cannot go on: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
