"""The command line's entry. A verb's module is imported when that verb is asked for, and nothing heavy before."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing would be a fifth of what --help costs
    from collections.abc import Iterator, Sequence
    from typing import NoReturn

VERBS = {
    "submit": "submit a run: your configuration, or any command after --",
    "plan": "what a run will need and take: memory, time, cost; layouts that fit",
    "render": "print exactly what submit would submit, and submit nothing",
    "status": "what is running, how far, and how it ended",
    "top": "a full-screen view of all runs",
    "dashboard": "a web page of all runs, for the team",
    "logs": "the output of a run's ranks, over all its attempts",
    "goodput": "where the node-hours went: of runs, sweeps, users, weeks",
    "resume": "go on with a stopped run from its last committed step",
    "cancel": "end runs for good",
    "sweep": "run a configuration with many values, as one study; also sweep status|report|best|resume",
    "metrics": "serve run states to Prometheus, and tell it where jobs serve theirs",
    "init": "ask a cluster what it has, and write a configuration for it",
    "doctor": "what works here, what is missing, and how to fix it",
    "ckpt": "list, check, name and remove checkpoints",
    "diff": "how two runs differ: configuration, code, environment, data, results",
    "clone": "a new run with the configuration of another, and what you change",
    "schema": "a JSON schema of the YAML files, for editors",
    "completion": "the script that makes TAB complete verbs, names, keys and values",
}
# Verbs of two words: what follows the first is one of these, or an override.
ACTIONS = {
    "sweep": {
        "status": "how a study's trials are doing",
        "report": "what a study has found: table, importance, plots, a page of HTML",
        "best": "the best trial of a study",
        "resume": "go on with a study: run failed trials again, add trials",
    }
}

EPILOG = """examples:
  llmops submit recipe=tiny --follow
  llmops submit --backend slurm recipe=tiny cluster.partition=gpu cluster.time=2:00:00
  llmops submit --backend slurm cluster.nodes=2 --name hello -- python train.py --lr 3e-4
  llmops sweep recipe=tiny train.lr=1e-3,3e-3 'train.seed=range(0,4)' --max-parallel 2
  llmops status
  llmops logs -f
"""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where help is; exit code 2."""
        argument, invalid, rest = message.removeprefix("argument ").partition(": invalid choice: ")
        if invalid:
            from llmops.suggest import hint

            wrong = rest.split("'")[1]
            chosen = next(action for action in self._actions if argument in (action.metavar, *_both(action)))
            known = list(chosen.choices or ())
            if chosen.dest in ("verb", "action"):
                message = f"there is no {chosen.dest} {wrong!r}{hint(wrong, known)}"
            else:
                message = f"{argument} {wrong}: choose one of {', '.join(known)}{hint(wrong, known)}"
        self.exit(complain(f"{message}; see `{self.prog} --help`", 2))

    def unrecognized(self, words: Sequence[str]) -> NoReturn:
        """Refuse words that are neither options nor arguments; exit code 2."""
        from llmops.suggest import hint

        wrong = next((word for word in words if word.startswith("-")), words[0])
        known = [name for name in self.names() if name.startswith("--")]
        self.error(f"unrecognized arguments: {' '.join(words)}{hint(wrong.partition('=')[0], known)}")

    def names(self) -> Iterator[str]:
        """All options, those of the verb included."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser.names()

    def format_help(self) -> str:
        """The help, with examples of the verb that can be pasted."""
        from llmops.cli.examples import EXAMPLES

        examples = EXAMPLES.get(self.prog.partition(" ")[2], "")
        text = super().format_help()
        return f"{text}\nexamples:\n{examples}" if examples else text


def _both(action: argparse.Action) -> tuple[str, ...]:
    return ("/".join(action.option_strings), action.dest)


def build_parser(verb: str | None) -> Parser:
    """The parser; only ``verb``'s own arguments are filled in, since filling in all would import all."""
    parser = Parser(
        prog="llmops",
        description="Launch LLM runs on SLURM, Kubernetes or this machine, and keep them going until they are done.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    hidden = {f"{first} {second}": text for first, actions in ACTIONS.items() for second, text in actions.items()}
    for name, summary in {**VERBS, **hidden}.items():
        described = summary[0].upper() + summary[1:] + "."
        if name in hidden:  # without a help text of its own, a verb is not listed
            sub = verbs.add_parser(name, description=described)
        else:
            sub = verbs.add_parser(name, help=summary, description=described)
        if name == verb:
            module = importlib.import_module(f"llmops.cli.{name.replace(' ', '_')}")
            sub.add_argument(
                "--runs-url", metavar="URL", help="the run store (default: LLMOPS_RUNS_URL, or the configuration)"
            )
            module.configure(sub)
            sub.set_defaults(run=module.run)
    return parser


def main(argv: list[str]) -> int:
    """Run one command. Returns the exit code: 0 fine, 1 the run failed or the cluster did not answer, 2 bad input."""
    arguments = parse(argv)
    if arguments.version:
        from llmops import __version__

        print(f"llmops {__version__}")
        return 0
    if arguments.verb is None:
        build_parser(None).print_help()
        return 0
    return _guarded(arguments)


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of one command. Leaves with exit code 2 where they are none."""
    command: list[str] = []
    if "--" in argv:
        cut = argv.index("--")
        argv, command = argv[:cut], argv[cut + 1 :]
        if not command:
            sys.exit(complain("nothing follows --: give the command to run, or leave -- out", 2))
    verb, argv = _verb(argv)
    parser = build_parser(verb)
    arguments, rest = parser.parse_known_args(argv)
    if rest:  # argparse takes the overrides that follow an option for strangers
        if not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest):
            parser.unrecognized(rest)
        arguments.overrides += rest
    if arguments.verb is not None:
        if command and arguments.verb not in ("submit", "render", "sweep"):
            sys.exit(complain(f"{arguments.verb} takes no command after --", 2))
        if arguments.runs_url == "":
            sys.exit(complain("--runs-url is empty: give a folder or a URL, or leave it out", 2))
    arguments.command = command
    return arguments


def _verb(argv: list[str]) -> tuple[str | None, list[str]]:
    """The verb, and the arguments with a verb of two words as one."""
    at = next((number for number, word in enumerate(argv) if not word.startswith("-")), None)
    if at is None:
        return None, argv
    actions = ACTIONS.get(argv[at], {})
    if argv[at + 1 : at + 2] and argv[at + 1] in actions:
        both = f"{argv[at]} {argv[at + 1]}"
        return both, [*argv[:at], both, *argv[at + 2 :]]
    return argv[at], argv


def _guarded(arguments: argparse.Namespace) -> int:
    from llmops.errors import ClusterError, UserError

    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except (UserError, ClusterError) as error:
        return complain(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader has seen enough (`llmops logs | head`).
        _discard_output()
        return 0
    except OSError as error:
        # What is left is this machine's: its disk is full, it has no more descriptors.
        _discard_output()
        return complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)


def complain(message: str, code: int) -> int:
    """Say on one line of stderr what is wrong, whatever the message holds; the exit code."""
    from llmops.monitor.text import clean

    print(f"llmops: error: {clean(' '.join(message.splitlines()))}", file=sys.stderr)
    return code


def _discard_output() -> None:
    """What is still buffered cannot be written; Python would complain once more while it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_streams() -> None:
    """Streams that take whatever is printed.

    Where the caller closed one, the next file that is opened would take its number.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name, and our own help, may hold what the terminal's encoding does not.
        sys.stdout.reconfigure(errors="replace")


def entry() -> None:
    """The console script."""
    _open_streams()
    if sys.argv[1:2] == ["__complete"]:  # what the shells' scripts ask at every TAB
        from llmops.cli.complete import answer

        sys.exit(answer(sys.argv[2:]))
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130  # what a shell says of a program that Ctrl-C ended
    sys.exit(code)
