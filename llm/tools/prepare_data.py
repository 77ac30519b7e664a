"""``python -m llm.tools.prepare_data``: text becomes a dataset of tokens. See docs/data.md.

Exit codes: 0 done, 1 a store did not answer or something is damaged, 2 what was given cannot work, 75 stopped on
request. After any of them the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import Any

import msgspec

from llm.train.control import EXIT_STOPPED, settle_signals
from llm.utils.config import ConfigError, PrepareConfig

HELP = {
    "input": "JSON lines, Parquet or text, also .gz and .zst: paths, fsspec URLs, and globs of them",
    "output": "folder or fsspec URL of the dataset",
    "tokenizer": "bytes, a tokenizer.json, its folder, or a tiktoken file of ranks",
    "train_tokenizer": "train a BPE with this many tokens on the input first",
    "tokenizer_mb": "MB of text to train it on",
    "format": "what the input is; auto goes by the names",
    "field": "of a row that holds the document (default: text, with --chat messages)",
    "paragraphs": "a document for each paragraph of text files, not for each file",
    "chat": "rows hold messages; only what the assistant says is learnt",
    "pack": "pack documents into rows for this seq_len",
    "dtype": "of the tokens; auto is the narrowest",
    "validation": "share of documents held out, by a hash of each",
    "seed": "of that hash",
    "deduplicate": "keep only the first of documents that are the same",
    "min_chars": "leave out shorter documents",
    "max_chars": "leave out longer ones",
    "min_alpha": "leave out documents with a smaller share of letters",
    "drop": "leave out documents in which this regular expression is found",
    "keep": "leave out rows whose field has another value; repeated for a field, any of them",
    "max_bad_fraction": "of lines that are no documents, above which there is no dataset",
    "unit_mb": "MB of input that are done, and after a crash done again, as one",
    "workers": "processes (default: one per core)",
    "overwrite": "replace another dataset that is there",
    "wait_s": "seconds without progress for which ranks wait for each other",
}
assert tuple(HELP) == PrepareConfig.__struct_fields__


def main(argv: list[str] | None = None) -> int:
    """Prepare; returns the exit code."""
    options = vars(_parser().parse_args(argv))
    slurm = {name: options.pop(name) for name in tuple(options) if name.startswith("slurm")}
    slurm["jobs"] = options.pop("jobs")
    try:
        return _run(_config(options), slurm)
    except KeyboardInterrupt:
        print("prepare_data: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "submitit", "tokenizers", "tiktoken", "pyarrow", "zstandard"):
            raise
        return _complain(f"{error.name} is not installed here: pip install 'llmops[data]'", 2)
    except ConfigError as error:
        return _complain(str(error), 2)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error)
        return _complain(reason, 1)


def _run(config: PrepareConfig, slurm: dict[str, Any]) -> int:
    from llm.data.format import DataError
    from llm.data.prepare.pool import WorkError
    from llm.data.prepare.run import Runner, Stopped, Watch

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    watch = Watch(rank)
    runner = Runner(config, watch, rank, world)
    try:
        if slurm.pop("slurm"):
            from llm.data.prepare.slurm import submit

            index: Any = submit(runner, **{name.removeprefix("slurm_"): value for name, value in slurm.items()})
        else:
            index = runner.prepare()
    except Stopped:
        watch.control.stopped(watch.items, "")
        print(f"stopped on request with {watch.items} units done; the same command goes on from here", file=sys.stderr)
        return EXIT_STOPPED
    except (DataError, WorkError) as error:
        return _complain(str(error), 1)
    print(f"prepared {runner.done_now} units; {runner.done_before} had been prepared before")
    if index is not None:
        print(_summary(config, index))
    return 0


def _summary(config: PrepareConfig, index: Any) -> str:
    report = index.report
    lines = [f"{config.output}: {index.dtype} tokens of {index.tokenizer.name}, {index.tokenizer.vocab_size} in all"]
    for split, shards in index.splits.items():
        documents, tokens = report["documents"][split], report["tokens"][split]
        line = f"  {split}: {tokens:,} tokens, {documents:,} documents, {report['bytes'][split]:,} bytes"
        packed = report["packing_efficiency"].get(split)
        line += f", rows of {index.row} filled to {100 * packed:.1f}%" if packed else ""
        lines.append(f"{line}, {len(shards)} shards")
    left_out = [f"{count:,} {reason}" for reason, count in report["filtered"].items()]
    left_out += [f"{report['duplicates']:,} duplicates"] if report["duplicates"] else []
    left_out += [f"{report['bad_lines']:,} bad lines"] if report["bad_lines"] else []
    if left_out:
        lines.append(f"  left out: {', '.join(left_out)}")
    return "\n".join([*lines, *(f"  {sample}" for sample in report["bad_samples"])])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llm.tools.prepare_data", description="Text becomes a dataset of tokens."
    )
    parser.add_argument("--config", metavar="FILE", help="YAML with a section `prepare`; flags win over it")
    for field in msgspec.structs.fields(PrepareConfig):
        flag = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=HELP[field.name])
        elif field.type == list[str]:
            parser.add_argument(
                flag, nargs="+", action="extend", default=argparse.SUPPRESS, metavar="X", help=HELP[field.name]
            )
        else:
            default = field.default if field.default not in (None, msgspec.NODEFAULT) else None
            note = f" (default: {default})" if default is not None else ""
            parser.add_argument(flag, default=argparse.SUPPRESS, metavar="X", help=HELP[field.name] + note)
    slurm = parser.add_argument_group("an array of SLURM jobs", "submitted by submitit; this process waits and merges")
    slurm.add_argument("--slurm", action="store_true", help="prepare there")
    slurm.add_argument("--jobs", type=_positive, default=8, metavar="N", help="elements of the array (default: 8)")
    slurm.add_argument("--slurm-partition", metavar="NAME")
    slurm.add_argument("--slurm-account", metavar="NAME")
    slurm.add_argument("--slurm-cpus", type=_positive, default=1, metavar="N", help="cores of an element (default: 1)")
    slurm.add_argument("--slurm-mem", metavar="SIZE", help="memory of an element, as 16GB")
    slurm.add_argument("--slurm-minutes", type=_positive, default=1440, metavar="N", help="time limit (default: 1440)")
    slurm.add_argument("--slurm-wait-hours", type=_positive, default=168, metavar="N", help="to wait (default: 168)")
    slurm.add_argument("--slurm-logs", default="slurm-logs", metavar="DIR", help="shared folder for output of the jobs")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return number


def _config(options: dict[str, Any]) -> PrepareConfig:
    """The options as flags and file say. Raises ConfigError."""
    source = options.pop("config")
    given = _section(source) if source else {}
    try:
        flags = msgspec.convert(options, PrepareConfig, strict=False)
        chosen = {name: getattr(flags, name) for name in options}
        return msgspec.convert({**given, **chosen}, PrepareConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: prepare: {error}" if source else f"prepare: {error}") from error


def _section(source: str) -> dict[str, Any]:
    import yaml

    from llm.utils.storage import open_storage

    folder, _, name = source.rpartition("/")
    try:
        tree = yaml.safe_load(open_storage(folder or ".").read(name))
    except OSError as error:
        raise ConfigError(f"{source}: cannot read the config: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    found = tree.get("prepare") if isinstance(tree, dict) else None
    if not isinstance(found, dict):
        raise ConfigError(f"{source} has no section `prepare`")
    return found


def _complain(message: str, code: int) -> int:
    """Say on one line what is wrong, whatever names it quotes."""
    text = "".join(letter if letter.isprintable() else " " for letter in " ".join(message.split()))
    print(f"prepare_data: error: {re.sub(' +', ' ', text)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    settle_signals()
    sys.exit(main())
