"""``python -m llm.eval --run-url RUN [--step N|newest|every]``: scores of a run's checkpoints. See docs/evaluation.md.

Exit codes: 0 done, 1 a checkpoint is damaged, a store did not answer or the training was silent, 2 what was given
cannot work, 75 stopped on request. After any of them the same command goes on where it stopped.
"""

import sys

from llm.train.control import EXIT_STOPPED, Control, settle_signals

if __name__ == "__main__":
    settle_signals()  # before anything slow

import argparse
import os

import msgspec

from llm.eval.options import check
from llm.train.environment import rank_environment
from llm.utils.config import ConfigError, EvaluationConfig, read

FLAGS = ("tasks", "task_dir", "limit", "num_fewshot", "batch_size", "stride", "log_samples", "run_code")


def main(argv: list[str] | None = None) -> int:
    """Evaluate as one rank; returns the exit code."""
    try:
        return run(configure(_parser().parse_args(argv)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llm.eval", description="Score the checkpoints of a run.")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML with run, step, follow, eval and dist; flags win over it"
    )
    parser.add_argument("--run-url", metavar="URL", help="run directory: a path or an fsspec URL")
    parser.add_argument("--step", help="a step, newest (the default), or every: all that have no score yet")
    parser.add_argument(
        "--follow", action="store_true", default=None, help="with --step every: until the training ends"
    )
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="of lm-evaluation-harness, or humaneval")
    parser.add_argument("--task-dir", metavar="DIR", help="folder with task files of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="the first so many examples of each task")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples that are shown before the question")
    parser.add_argument("--batch-size", type=int, metavar="N", help="rows at a time")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens of a long text that are scored at a time")
    parser.add_argument("--log-samples", action="store_true", default=None, help="keep what the model answered")
    parser.add_argument("--run-code", action="store_true", default=None, help="run programs that the model writes")
    return parser


def configure(options: argparse.Namespace) -> EvaluationConfig:
    """The file with the flags in it. Raises ConfigError."""
    base = read(options.config, EvaluationConfig) if options.config else EvaluationConfig()
    own = {name: getattr(options, name) for name in FLAGS if getattr(options, name) is not None}
    step = (
        options.step if options.step in (None, "newest", "every") or not options.step.isdecimal() else int(options.step)
    )
    top = {"run": options.run_url, "step": step, "follow": options.follow}
    try:
        data = msgspec.to_builtins(base)
        data = {**data, **{name: value for name, value in top.items() if value is not None}}
        return msgspec.convert({**data, "eval": {**data["eval"], **own}}, EvaluationConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{options.config or 'command line'}: {str(error).replace('$.', '')}") from error


def run(evaluation: EvaluationConfig) -> int:
    """Everything after the config is read. Raises ConfigError."""
    rank, size, local_rank = rank_environment()
    if not evaluation.run:
        raise ConfigError("no run to evaluate: give --run-url, or run in the config")
    check(evaluation, size)
    control = Control(rank, os.environ.get("LLMOPS_CONTROL_DIR"))
    control.heartbeat("import")
    from llm.eval.suite import quiet_harness

    with quiet_harness(evaluation.eval.hub):
        import torch.distributed as dist

        from llm.checkpoint.format import CheckpointError
        from llm.eval.harness import Stopped
        from llm.eval.runner import Evaluator
        from llm.train.dist import lay_out
        from llm.train.world import connect

        control.heartbeat("connect")
        world = connect(evaluation.dist, rank, size, local_rank)
        evaluator = None
        try:
            evaluator = Evaluator(evaluation, evaluation.run, lay_out(evaluation.dist, world), control)
            return evaluator.run()
        except Stopped:
            control.stopped(control.step or 0, "")
            if rank == 0:
                print("stopped on request; the same command goes on from here", file=sys.stderr)
            return EXIT_STOPPED
        except (CheckpointError, OSError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
        finally:
            if world.grouped:
                dist.destroy_process_group()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written. Taking the interpreter with torch apart would cost seconds of what a stop request leaves.
    os._exit(code)
