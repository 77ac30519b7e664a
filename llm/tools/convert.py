"""``python -m llm.tools.convert import|export``: checkpoints of other formats come in and go out.

Exit codes: 0 done, 1 something is damaged or a store did not answer, 2 what was given cannot work.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any

from llm.checkpoint.format import CheckpointError, Commit, DamagedError
from llm.checkpoint.lineage import newest_commit
from llm.tools.arguments import DTYPES, arguments_of_export, arguments_of_import
from llm.utils.config import ConfigError, ModelConfig, load
from llm.utils.storage import Storage, open_storage

CONFIG = "config.yaml"
STEPS = ("step", "global_step", "iteration")  # the last part of the names under which others keep the step
SHOWN = 10

stopped = threading.Event()  # by a signal


def main(argv: list[str] | None = None) -> int:
    """Convert; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m llm.tools.convert", description="Checkpoints of other formats come in and go out."
    )
    parser.add_argument("--prog", default="convert", help=argparse.SUPPRESS)  # whose errors they are
    actions = parser.add_subparsers(dest="action", required=True)
    coming = actions.add_parser("import")
    coming.add_argument(
        "source", help="a directory of torch.distributed.checkpoint or of safetensors files: path or URL"
    )
    coming.add_argument("run_url", help="run directory: path or URL")
    arguments_of_import(coming)
    going = actions.add_parser("export")
    going.add_argument("run_url", help="run directory: path or URL")
    going.add_argument("target", help="path or URL that does not exist yet")
    going.add_argument("--commit", help="checkpoints/step_.../... (default: the newest)")
    arguments_of_export(going)
    options = parser.parse_args(argv)

    def complain(message: str, code: int) -> int:
        """Say on one line what is wrong, whatever names it quotes."""
        if stopped.is_set():  # torch turns an interrupt that comes while it reads into an error of its own
            raise KeyboardInterrupt
        print(f"{options.prog}: error: {re.sub(r'[^ -~]+', ' ', ' '.join(message.split()))}", file=sys.stderr)
        return code

    try:
        run_import(options) if options.action == "import" else run_export(options)
        return 0
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "numpy"):
            raise
        return complain(f"{error.name} is not installed here: pip install 'llmops[train]'", 2)
    except DamagedError as error:
        return complain(str(error), 1)
    except (CheckpointError, ConfigError) as error:
        return complain(str(error), 2)
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error)
        return complain(reason, 1)


def run_import(options: argparse.Namespace) -> None:
    """A checkpoint of ours from another format."""
    import torch  # noqa: F401 - to say at once that it is missing

    from llm.tools.commit_writer import next_commit, write_commit
    from llm.tools.hf_run import describe_run, model_of
    from llm.tools.renaming import rename

    storage = open_storage(_absolute(options.run_url))
    model = _model_config(storage)
    if options.heads is not None and options.heads < 1:
        raise CheckpointError(f"--heads {options.heads}: give the number of query heads")
    folder = open_storage(_absolute(options.source))
    source = _open(folder)
    described = model_of(folder) if model is None and source.format == "hf" else None
    model = model or described
    heads = options.heads or (model.n_heads if model else None)
    if source.unreadable and not options.skip_unreadable:
        raise CheckpointError(
            f"{options.source}: {_few(source.unreadable)} cannot be read without running code that is stored there; "
            "--skip-unreadable leaves them out"
        )
    names = rename(source, options.map, heads, bool(model and model.tie_embeddings))
    if not source.items:
        raise CheckpointError(f"{options.source} holds no tensors")
    _refuse_duplicates(source.items, options.source)
    step = _step(options, source)
    state = {**(source.state or _state_of(options.source, source, names)), "step": step}
    commit, parent = next_commit(storage, step)
    written = describe_run(storage, folder, described) if described else None
    with _progress("importing") as (expect, advance):
        expect(sum(item.box.bytes for item in source.items))
        manifest = write_commit(storage, commit, parent, source.items, state, advance)
    print(f"imported {commit.path}: {_amount({item.box.name for item in source.items}, manifest.bytes)}, {names}")
    if written:
        print(f"wrote {written} from {options.source}")
    if source.unreadable:
        print(f"left out {len(source.unreadable)}: {_few(source.unreadable)}")


def run_export(options: argparse.Namespace) -> None:
    """A checkpoint of ours in another format."""
    import torch  # noqa: F401 - to say at once that it is missing

    from llm.tools.dcp_export import export_dcp
    from llm.tools.export import export_torch, opened
    from llm.tools.export_hf import export_hf
    from llm.tools.lora_export import export_peft, has_adapters, merged

    theirs = options.format in ("hf", "peft")
    if theirs and options.only:
        raise CheckpointError(
            f"--only is for --format dcp and torch: {options.format} has the weights of the model, and all of them"
        )
    if not theirs and options.dtype:
        raise CheckpointError("--dtype is for --format hf and peft: the others hold exactly what was saved")
    storage = open_storage(_absolute(options.run_url))
    commit = Commit.parse(options.commit) if options.commit else newest_commit(storage)
    if commit is None:
        raise CheckpointError(f"{storage.url} holds no committed checkpoint")
    model = _model_config(storage) if theirs else None
    if theirs and model is None:
        raise CheckpointError(f"{storage.url} has no {CONFIG} that tells the shape of the model")
    target = _absolute(options.target)
    with _progress("exporting") as (expect, advance), opened(storage, commit, advance) as source:
        wanted = tuple(options.only or ("model." if model else "",))
        names = [name for name in source.tensors if name.startswith(wanted)]
        if not names:
            raise CheckpointError(f"{commit.path} has no tensor whose name begins with {' or '.join(wanted)}")
        if options.format == "hf" and has_adapters(source):
            source = merged(source, load(f"{storage.url}/{CONFIG}"))
            names = list(source.tensors)
        expect(source.bytes(names))
        if options.format == "peft":
            export_peft(source, load(f"{storage.url}/{CONFIG}"), DTYPES.get(options.dtype), target)
        elif model is not None:
            export_hf(source, model, DTYPES.get(options.dtype), target)
        elif options.format == "dcp":
            export_dcp(source, names, target)
        else:
            export_torch(source, names, target)
    print(f"exported {commit.path} to {target}: {_amount(names, source.bytes(names))}")


def _open(storage: Storage) -> Any:
    from llm.tools.dcp_import import open_dcp
    from llm.tools.dcp_metadata import METADATA
    from llm.tools.hf_import import SUFFIX, open_hf

    sizes = storage.sizes("")
    try:
        return open_dcp(storage)
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        raise CheckpointError(f"{storage.url} is a file: give the directory that it is in") from None
    if any(name.endswith(SUFFIX) for name in sizes):
        return open_hf(storage, sizes)
    if any(name.endswith(METADATA) for name in sizes):
        raise CheckpointError(f"{storage.url} was saved without collectives, one {METADATA} a rank: save it with them")
    raise CheckpointError(f"{storage.url} is no checkpoint: it has neither {METADATA} nor *{SUFFIX}")


def _model_config(storage: Storage) -> ModelConfig | None:
    """Shape of the model that the run trains; None where nobody wrote one down."""
    import msgspec
    import yaml

    try:
        tree = yaml.safe_load(storage.read(CONFIG))
        shape = tree.get("model") if isinstance(tree, dict) else None
        return None if shape is None else msgspec.convert(shape, ModelConfig)
    except FileNotFoundError:
        return None
    except yaml.YAMLError as error:
        raise ConfigError(f"{storage.url}/{CONFIG} is not YAML: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{storage.url}/{CONFIG}: model: {error}") from error


def _step(options: argparse.Namespace, source: Any) -> int:
    """The step that was asked for, or that the source has; else what its folder is called, as in step-100."""
    from llm.tools.dcp_import import to_json

    if options.step is not None:
        return _checked_step(options.step)
    found = {value for name, value in source.values.items() if _says_step(name) and type(value) is int}
    for item in source.items:
        if not item.box.shape and _says_step(item.box.name):
            found.add(to_json(item.read()))
    folder = re.fullmatch(r".*?(?:step|iter)[-_]?0*(\d{1,17})", options.source.rstrip("/").rpartition("/")[2])
    candidates = [(source.state or {}).get("step")]
    candidates += found if len(found) == 1 else []
    candidates += [int(folder[1])] if folder else []
    for step in candidates:
        if isinstance(step, int | float) and not isinstance(step, bool):
            return _checked_step(step)
    if source.format == "hf":
        return 0
    raise CheckpointError(f"{options.source} does not say of which step it is: give --step N")


def _checked_step(step: float) -> int:
    if not 0 <= step < 10**17 or step != int(step):
        raise CheckpointError(f"{step} cannot be a step: give --step N")
    return int(step)


def _says_step(name: str) -> bool:
    return name.rpartition(".")[2] in STEPS and not name.startswith(("optimizer.state.", "optim.state."))


def _state_of(given: str, source: Any, names: str) -> dict[str, Any]:
    """The state of a checkpoint that is not of our training."""
    return {
        "imported": {
            "from": given,
            "format": source.format,
            "names": names,
            "left_out": source.unreadable,
            "values": source.values,
        }
    }


def _refuse_duplicates(items: list[Any], given: str) -> None:
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for item in items:
        key = item.box.name, tuple(item.box.offset)
        if key in seen:
            raise CheckpointError(f"{given}: two tensors would be called {item.box.name}")
        seen.add(key)


def _absolute(given: str) -> str:
    """A path or URL without what only a shell knows."""
    from pathlib import Path

    return given.rstrip("/") if "://" in given else str(Path(given).expanduser().absolute())


def _amount(names: Collection[str], size: int) -> str:
    scale = next((scale for scale in (1e9, 1e6, 1e3) if size >= scale), 1)
    unit = {1e9: "GB", 1e6: "MB", 1e3: "kB", 1: "B"}[scale]
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}, {size / scale:.3g} {unit}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


@contextlib.contextmanager
def _progress(what: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """(say how many bytes there are, count some): with a bar on a terminal, and without one elsewhere."""
    if not sys.stderr.isatty():
        yield lambda total: None, lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda total: bar.update(task, total=total), lambda count: bar.advance(task, count)


def _stop(*_: object) -> None:
    stopped.set()
    raise KeyboardInterrupt


def entry() -> None:
    """The program: a stop request ends it as Ctrl-C does, so that nothing half done stays."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    entry()
