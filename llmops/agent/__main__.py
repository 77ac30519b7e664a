"""``python agent.pyz local|slurm|node``: the supervisor's entry points."""

from __future__ import annotations

import argparse
import os
import sys


def main(argv: list[str]) -> int:
    """Parse and dispatch."""
    parser = argparse.ArgumentParser(prog="agent.pyz", description="The supervisor inside an llmops job.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for backend in ("local", "slurm"):
        verb = verbs.add_parser(backend, help=f"supervise a job of the {backend} backend")
        verb.add_argument("--run", required=True, help="run directory")
        verb.add_argument("--submission", type=int, required=True)
    node = verbs.add_parser("node", help="run the ranks of one node (started by the supervisor)")
    node.add_argument("--node", type=int, default=None, help="index of this node; default: SLURM_NODEID")
    arguments = parser.parse_args(argv)
    if arguments.verb == "node":
        from llmops.agent.node import main as run_node

        index = arguments.node if arguments.node is not None else int(os.environ["SLURM_NODEID"])
        return run_node(index)
    if arguments.verb == "slurm":
        from llmops.agent.slurm import main as run_slurm

        return run_slurm(arguments.run, arguments.submission)
    from llmops.agent.local import main as run_local

    return run_local(arguments.run, arguments.submission)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
