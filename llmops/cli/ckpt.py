"""``llmops ckpt``. An action's module is imported when that action is asked for."""

from __future__ import annotations

import argparse
import importlib

WHERE = "name, id or prefix of a run, or the path or URL of a run directory"
WHICH = f"{WHERE}; then, after an @, the step, the tag, or step/commit as `llmops ckpt ls` shows them"


def configure(parser: argparse.ArgumentParser) -> None:
    """The actions, each with its own arguments."""
    parser.description = "List, check, name and remove the checkpoints of a run."
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, (summary, arguments, _) in ACTIONS.items():
        sub = actions.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        # Also after the action: there people write it.
        sub.add_argument("--runs-url", metavar="URL", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        arguments(sub)


def run(arguments: argparse.Namespace) -> int:
    """Do what the action says."""
    code: int = importlib.import_module(f"llmops.cli.{ACTIONS[arguments.action][2]}").run(arguments)
    return code


def _ls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ref", metavar="RUN|URL", help=WHERE)
    parser.add_argument("--json", action="store_true", help="one object a checkpoint, on stdout alone")


def _show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ref", metavar="RUN[@WHICH]", help=f"{WHICH}; default: the newest")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--all", action="store_true", help="all tensors, not only the first")
    output.add_argument("--json", action="store_true", help="everything as one object, on stdout alone")


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ref", metavar="RUN[@WHICH]", help=f"{WHICH}; default: the newest")
    parser.add_argument("--all", action="store_true", help="every committed checkpoint")


def _diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("one", metavar="RUN@WHICH", help=WHICH)
    parser.add_argument("two", metavar="RUN@WHICH", help="the other one; @WHICH alone means the same run")
    parser.add_argument(
        "--values", action="store_true", help="compare the values of all tensors too, by checksum or byte"
    )


def _gc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ref", metavar="RUN|URL", help=WHERE)
    parser.add_argument("--keep-last", type=int, metavar="K", help="of the lineage keep the newest K")
    parser.add_argument("--keep-every", type=int, metavar="N", help="and the steps that N divides")
    parser.add_argument("--keep-best", metavar="METRIC:min|max", help="and the best one by a number in its state")
    parser.add_argument("--yes", action="store_true", help="remove; without it, only show what would be removed")
    parser.epilog = (
        "Without a --keep rule the whole lineage stays: only what was never committed or is not on the lineage goes. "
        "Never removed: the newest commit, files of an attempt that may be at work, and what is tagged or being read."
    )


def _rm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("refs", nargs="+", metavar="RUN@WHICH", help=WHICH)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--force", action="store_true", help="also what the run resumes from, is tagged or in use")


def _tag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ref", metavar="RUN[@WHICH]", help=f"{WHICH}; default: the newest")
    parser.add_argument("name", metavar="NAME", help="what is tagged is kept until the tag is deleted")
    parser.add_argument("--delete", action="store_true", help="take the name away")


def _save(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ref", metavar="RUN|URL", help=WHERE)
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds to wait (default: %(default)g)"
    )


def _import(parser: argparse.ArgumentParser) -> None:
    from llm.tools.arguments import arguments_of_import

    parser.add_argument("source", metavar="SOURCE", help="a directory of torch.distributed.checkpoint or safetensors")
    parser.add_argument("ref", metavar="RUN|URL", help=f"{WHERE}, which may be new")
    arguments_of_import(parser)


def _export(parser: argparse.ArgumentParser) -> None:
    from llm.tools.arguments import arguments_of_export

    parser.add_argument("ref", metavar="RUN[@WHICH]", help=f"{WHICH}; default: the newest")
    parser.add_argument("target", metavar="TARGET", help="path or URL that does not exist yet")
    arguments_of_export(parser)


# Action -> what it does, its arguments, and the module that does it.
ACTIONS = {
    "ls": ("list all checkpoints: steps, ages, sizes, tags, and which of them count", _ls, "ckpt_show"),
    "show": ("show one checkpoint: layout, tensors and state", _show, "ckpt_show"),
    "verify": ("read and check every byte of a checkpoint", _verify, "ckpt_verify"),
    "diff": ("show how two checkpoints differ", _diff, "ckpt_show"),
    "gc": ("remove the checkpoints that no rule keeps, and what was left behind", _gc, "ckpt_remove"),
    "rm": ("remove checkpoints", _rm, "ckpt_remove"),
    "tag": ("give a checkpoint a name, which keeps it", _tag, "ckpt_tag"),
    "import": ("make a checkpoint of one that torch or Hugging Face wrote", _import, "ckpt_convert"),
    "export": ("write a checkpoint as torch or Hugging Face read it", _export, "ckpt_convert"),
    "save": ("ask a run that is training for a checkpoint now, and wait for it", _save, "ckpt_save"),
}
