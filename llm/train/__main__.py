"""``python -m llm.train --config PATH_OR_URL [--run-url URL]``: one rank of a training run.

Without these options, ``python -m llm.train [--multirun] key=value ...`` is a Hydra application: see ``hydra_main``.

Exit code 0 when done, 75 when stopped on request with the state saved, 2 for a config that cannot work, 1 otherwise.
"""

import os
import sys
import time

STARTED = time.time()  # the accounts of a run begin here

_OWN = ("--config", "--run-url", "-h", "--help")
if __name__ == "__main__" and not any(argument.partition("=")[0] in _OWN for argument in sys.argv[1:]):
    if "LLMOPS_RUN_URL" in os.environ:  # else signals are the launcher's
        from llm.train.control import settle_signals

        settle_signals()
    from llm.train.hydra_main import main as hydra_main

    hydra_main()
    sys.exit()

from llm.train.control import settle_signals  # noqa: E402

settle_signals()  # before anything slow: a signal during the imports must not kill the rank

import argparse  # noqa: E402

from llm.train.control import Control  # noqa: E402
from llm.utils.config import ConfigError, TrainingConfig, check, load  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Run one rank and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m llm.train",
        description="One rank of a training run.",
        epilog="Without these options: Hydra's way, [--multirun] key=value ...; --hydra-help says more.",
    )
    parser.add_argument("--config", required=True, help="YAML file: a path or an fsspec URL")
    parser.add_argument(
        "--run-url", default=os.environ.get("LLMOPS_RUN_URL"), help="run directory (default: $LLMOPS_RUN_URL)"
    )
    arguments = parser.parse_args(argv)
    try:
        if not arguments.run_url:
            raise ConfigError("no run directory: give --run-url or set LLMOPS_RUN_URL")
        return run(load(arguments.config), arguments.run_url)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(config: TrainingConfig, run_url: str) -> int:
    """Everything after the config is read."""
    from llm.train.environment import rank_environment

    rank, size, local_rank = rank_environment()
    check(config, size)
    control = Control(rank, os.environ.get("LLMOPS_CONTROL_DIR"))
    control.heartbeat("import")

    from llm.train.attempt import run_attempt

    return run_attempt(config, run_url, control, rank, size, local_rank, STARTED)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is saved and closed. Taking the interpreter with torch apart would cost seconds of what a stop request leaves.
    os._exit(code)
