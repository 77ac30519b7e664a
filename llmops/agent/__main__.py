"""``python agent.pyz local|slurm|k8s|torchx|pool|node|notify``: the supervisor's entry points."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from llmops.agent.log import log
from llmops.agent.rundir import StoreError, open_rundir
from llmops.agent.signals import STOP_SIGNALS
from llmops.agent.trial import NothingToDo, element, open_trial


def main(argv: list[str]) -> int:
    """Parse and dispatch."""
    parser = argparse.ArgumentParser(prog="agent.pyz", description="The supervisor inside an llmops job.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for backend in ("local", "slurm", "k8s"):
        verb = verbs.add_parser(backend, help=f"supervise a job of the {backend} backend")
        what = verb.add_mutually_exclusive_group(required=True)
        what.add_argument("--run", help="run directory: a path or a URL")
        what.add_argument("--study", help="directory of a study, of whose array this job is one element")
        verb.add_argument("--submission", type=int, required=True)
    replica = verbs.add_parser("torchx", help="supervise a job of a TorchX scheduler, in each of its replicas")
    replica.add_argument("--run", required=True)
    replica.add_argument("--submission", type=int, required=True)
    replica.add_argument("--node", type=int, required=True)
    replica.add_argument("--main", default="", help="the host of replica 0")
    pool = verbs.add_parser("pool", help="run a study's trials on this machine, a few at a time")
    pool.add_argument("--study", required=True)
    pool.add_argument("--submission", type=int, required=True)
    node = verbs.add_parser("node", help="run the ranks of one node (started by the supervisor)")
    node.add_argument("--node", type=int, default=None, help="index of this node; default: SLURM_NODEID")
    verbs.add_parser("notify", help="tell people how an attempt ended (started by the supervisor)")
    arguments = parser.parse_args(argv)
    if arguments.verb == "notify":
        from llmops.agent.notify import main as tell

        return tell()
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
        if arguments.verb == "pool":
            from llmops.agent.pool import main as run_pool

            return run_pool(arguments.study, arguments.submission)
        if arguments.verb == "torchx":
            from llmops.agent.torchx import main as run_replica

            rundir = open_rundir(arguments.run)
            return run_replica(rundir, arguments.submission, arguments.node, arguments.main)
        if arguments.run:
            return supervise(open_rundir(arguments.run), arguments.submission)
        # Signals that come while the trial's run is made are kept until its supervisor has its handlers: one that is
        # blocked is not lost, even where it is ignored.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        rundir, submission = open_trial(arguments.study, arguments.submission, element(dict(os.environ)))
        return supervise(rundir, submission)
    except NothingToDo as error:
        log(f"nothing to do: {error}")
        return error.exit_code
    except (StoreError, ValueError, FileNotFoundError) as error:
        # A damaged or missing record: guessing would be worse than stopping.
        print(f"llmops: the supervisor cannot go on: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
