"""The harness's tasks: which there are, what they are made of, and the scores of a model in one of them.

Task files that lie beside this one, or in a folder of the user's, read JSON lines; their ``data_files`` are relative
to the task file. Those that the harness ships nearly all download their data.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.utils.config import ConfigError, EvalConfig

if TYPE_CHECKING:
    from llm.eval.harness import HarnessModel

OWN = Path(__file__).parent / "tasks"
BOOTSTRAP = 1000  # samples for the standard error of a perplexity


@dataclass(frozen=True)
class Suite:
    """A task, group or tag, ready to be asked."""

    name: str
    loaded: Any  # the harness's dict of tasks and groups
    checksums: dict[str, str]  # SHA-256 by path of each file it is made of, as far as they are local


@dataclass(frozen=True)
class Scores:
    """Of one model, by metric; of a group of tasks by task/metric."""

    values: dict[str, float]
    stderr: dict[str, float]
    higher_is_better: dict[str, bool]
    examples: int
    samples: list[dict[str, Any]]


@contextlib.contextmanager
def quiet_harness(hub: bool) -> Iterator[None]:
    """The harness without progress bars and pools of processes, with a cache of its own; off line unless ``hub``."""
    with tempfile.TemporaryDirectory(prefix="llm-eval-") as folder:
        given = {"LMEVAL_DISABLE_MULTIPROC": "1", "TQDM_DISABLE": "1", "LMEVAL_LOG_LEVEL": "WARNING"}
        given |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if not hub:
            given |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": folder}
        for name, value in given.items():
            os.environ.setdefault(name, value)
        try:
            import lm_eval  # noqa: F401 - reads the environment when it is first imported
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is not installed here: pip install 'llmops[eval]'") from error
        yield


def find(config: EvalConfig) -> dict[str, Suite]:
    """What ``eval.tasks`` names, by name, ``humaneval`` aside. Raises ConfigError."""
    from lm_eval.tasks import TaskManager

    folders = [OWN]
    if config.task_dir is not None:
        folders.append(Path(config.task_dir))
        if not folders[-1].is_dir():
            raise ConfigError(f"eval.task_dir={config.task_dir}: there is no such folder")
    manager = TaskManager(include_path=[str(each) for each in folders], include_defaults=config.hub)
    data = _place_data(manager.task_index, folders)
    found = {}
    for name in config.tasks:
        if name == "humaneval":
            continue
        if name not in manager.task_index:
            close = get_close_matches(name, manager.all_tasks, n=3)
            hint = (
                f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(manager.all_tasks[:20])}"
            )
            more = "" if config.hub else " (eval.hub=true adds the harness's own)"
            raise ConfigError(f"eval.tasks: there is no task {name}{hint}{more}")
        try:
            loaded = manager.load([name])
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise ConfigError(f"eval.tasks: {name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
        found[name] = Suite(name, loaded, _checksums(loaded, manager.task_index, data))
        _settle(found[name], config)
    return found


def _place_data(index: Mapping[str, Any], folders: list[Path]) -> dict[str, list[Path]]:
    """Make the data files of tasks in ``folders`` absolute. Returns those of each task, its own file first."""
    from lm_eval.tasks._yaml_loader import load_yaml

    found: dict[str, list[Path]] = {}
    for name, entry in index.items():
        own = entry.yaml_path
        if own is None or not any(own.is_relative_to(each.resolve()) or own.is_relative_to(each) for each in folders):
            continue
        found[name] = [own]
        given = (entry.cfg or {}).get("dataset_kwargs") or {}
        if (entry.cfg or {}).get("dataset_path") != "json" or "data_files" not in given:
            continue

        def absolute(value: Any, beside: Path = own.parent, files: list[Path] = found[name]) -> Any:
            if isinstance(value, dict):
                return {key: absolute(each, beside, files) for key, each in value.items()}
            if isinstance(value, list):
                return [absolute(each, beside, files) for each in value]
            if "://" in value:
                return value
            files.append(beside / value)
            return str(beside / value)

        whole = load_yaml(own, resolve_func=True)
        kwargs = {**given, "data_files": absolute(given["data_files"])}
        entry.cfg, entry.yaml_path = {**whole, "dataset_kwargs": kwargs}, None
    return found


def _checksums(loaded: Any, index: Mapping[str, Any], data: Mapping[str, list[Path]]) -> dict[str, str]:
    """Of the files of every task in ``loaded``, by name of the file; of two with one name, by task and name."""
    found: dict[str, str] = {}
    for name in loaded["tasks"]:
        entry = index.get(name)
        files = data.get(name) or ([entry.yaml_path] if entry is not None and entry.yaml_path is not None else [])
        for file in files:
            try:
                own = digest(file.read_bytes())
            except OSError as error:
                raise ConfigError(f"eval.tasks: {name}: {file}: {error.strerror}") from error
            found[file.name if found.get(file.name, own) == own else f"{name}/{file.name}"] = own
    return found


def digest(data: bytes) -> str:
    """SHA-256, as results name files."""
    return hashlib.sha256(data).hexdigest()


def _settle(suite: Suite, config: EvalConfig) -> None:
    """Shots and their seed, as the harness's own command line sets them."""
    for task in suite.loaded["tasks"].values():
        if config.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=config.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=config.seed)
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"eval.tasks: {suite.name} runs what the model writes, outside of any sandbox: use humaneval instead"
            )


def score(model: HarnessModel, suite: Suite, config: EvalConfig) -> Scores:
    """Ask and score. Raises ``Stopped``, and ConfigError for a task that cannot be asked."""
    from lm_eval.evaluator import evaluate

    try:
        found = evaluate(
            lm=model, task_dict=suite.loaded, limit=config.limit, bootstrap_iters=BOOTSTRAP, log_samples=True
        )
    finally:
        for task in suite.loaded["tasks"].values():
            task._instances = None  # the next commit is asked anew
    values: dict[str, float] = {}
    stderr: dict[str, float] = {}
    better: dict[str, bool] = {}
    for task, metrics in found["results"].items():
        for given, value in metrics.items():
            metric, _, kind = given.partition(",")
            if not isinstance(value, int | float) or isinstance(value, bool) or not kind:
                continue
            plain = metric.removesuffix("_stderr")
            name = plain if kind == "none" else f"{plain}.{kind}"
            name = name if len(found["results"]) == 1 else f"{task}/{name}"
            if metric.endswith("_stderr"):
                stderr[name] = float(value)
                continue
            values[name] = float(value)
            known = (found.get("higher_is_better", {}).get(task) or {}).get(metric)
            if known is not None:
                better[name] = bool(known)
    samples = [{"task": task, **each} for task, many in found["samples"].items() for each in many]
    examples = sum(each["effective"] for each in found["n-samples"].values())
    for task in suite.loaded["tasks"].values():
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            name = "token_perplexity" if len(found["results"]) == 1 else f"{task.task_name}/token_perplexity"
            values[name], better[name] = _per_token(model, found["samples"][task.task_name]), False
    return Scores(values, stderr, better, examples, samples)


def _per_token(model: HarnessModel, samples: list[dict[str, Any]]) -> float:
    """What the harness, which knows no tokens, does not tell."""
    from llm.eval.metrics import Perplexity

    total = Perplexity()
    for sample in samples:
        text = sample["arguments"][0][0]
        total += Perplexity.of(text, sample["filtered_resps"][0], len(model.tok_encode(text)))
    return total.per_token
