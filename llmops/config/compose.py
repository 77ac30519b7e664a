"""Overrides and YAML files to one typed, checked configuration. Composed once and remembered; no job recomposes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

import llm.data.prepare.options
import llm.estimate.hardware
import llm.eval.options
import llm.inference.serving
import llm.utils.config
import llmops.ssh.address
from llmops import __version__
from llmops.agent import torchrun
from llmops.config import cache, groups, hydra_call, interpolate, k8s_rules, rules, schema
from llmops.config import overrides as override_text
from llmops.config.schema import RunConfig
from llmops.errors import UserError

# Numbers that people write for text: minutes, MB, Kubernetes' quantities.
_NUMBER_AS_TEXT = ("time", "mem", "mem_per_cpu", "cpus", "memory", "ephemeral_storage", "shm")


class Composed(NamedTuple):
    """A configuration as a value, as the text of ``config.yaml``, and as plain data in the same order."""

    config: RunConfig
    yaml_text: str
    data: dict[str, Any]


def load_config(overrides: Sequence[str] = (), config_dir: Path | None = None) -> Composed:
    """Compose, check and type a run's configuration.

    ``overrides`` are Hydra's (``group=option``, ``key=value``); ``config_dir`` holds further groups of the user's own.
    Raises :class:`UserError` for anything that cannot work.
    """
    override_text.check_text(overrides)
    files = groups.read(config_dir)
    key = cache.digest(_dependencies(files), overrides)
    known = cache.load(key)
    if known is not None:
        data, text = known
        return Composed(msgspec.convert(data, RunConfig), text, data)
    raw, pure = _compose(files, overrides)
    try:
        config = msgspec.convert(raw, RunConfig)
    except msgspec.ValidationError as error:
        from llmops.config import errors

        raise errors.from_validation(error, raw, files, overrides) from error
    rules.check(config)
    data = msgspec.to_builtins(config)
    text = to_yaml(data)
    if pure:
        cache.save(key, data, text)
    return Composed(config, text, data)


def compose(overrides: Sequence[str] = (), config_dir: Path | None = None) -> dict[str, Any]:
    """The checked configuration as plain data, every key present, in the order of the schema."""
    return load_config(overrides, config_dir).data


def group(name: str, option: str, config_dir: Path | None = None) -> dict[str, Any]:
    """One group of the configuration as its file has it; whether its values go together is not checked."""
    found: dict[str, Any] = _compose(groups.read(config_dir), [f"{name}={option}"])[0][name]
    return found


def _dependencies(files: groups.Groups) -> Iterator[tuple[str, bytes]]:
    """Everything that decides what a composition gives, besides its overrides."""
    yield "llmops", __version__.encode()
    for module in (
        schema,
        rules,
        k8s_rules,
        torchrun,
        override_text,
        llm.utils.config,
        llm.data.prepare.options,
        llm.estimate.hardware,
        llm.eval.options,
        llm.inference.serving,
        llmops.ssh.address,
        sys.modules[__name__],
    ):
        yield module.__name__, Path(str(module.__file__)).read_bytes()
    for package, version_file in (("hydra", "__init__.py"), ("omegaconf", "version.py")):
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"the package {package} is missing: install llmops again, with its dependencies")
        yield package, Path(spec.origin).with_name(version_file).read_bytes()
    for file in files.files:
        own = file.path.parents[file.name.count("/")] != files.folders[0]
        yield f"{'own' if own else 'shipped'}/{file.name}", file.content


def _compose(files: groups.Groups, overrides: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """Composed plain data with interpolations resolved, and whether only files and overrides decided it."""
    _, resolved, called = _compose_both(files, overrides)
    return resolved, not called and files.pure() and not any("../" in text for text in overrides)


def load_base(overrides: Sequence[str], config_dir: Path | None = None) -> dict[str, Any]:
    """What :func:`finish` makes configurations of: composed data whose interpolations are as they were written.

    It is checked as by :func:`load_config`, with the same errors.
    """
    load_config(overrides, config_dir)
    return _compose_both(groups.read(config_dir), overrides)[0]


def finish(base: dict[str, Any], what: str) -> Composed:
    """A configuration of data as :func:`load_base` gives it, with values changed. ``what`` was: for the error.

    Raises :class:`UserError` for values that do not fit.
    """
    data = _as_text(interpolate.resolved(base))
    try:
        config = msgspec.convert(data, RunConfig)
    except msgspec.ValidationError as error:
        from llmops.config import errors

        raise UserError(f"{what}: {errors.from_validation(error, data, groups.Groups([], []), ())}") from error
    try:
        rules.check(config)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    return Composed(config, "", msgspec.to_builtins(config))


def _compose_both(files: groups.Groups, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Composed plain data with its interpolations and without, and the names of the resolvers that they call."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from llmops.config import errors  # its tables are of use only now

    options = files.options().keys()
    for override in overrides:
        if override_text.key_of(override) in options and (override[0] == "~" or override.endswith("=null")):
            raise UserError(f"override {override}: a run needs this group; choose one of its options")
    arguments = override_text.as_typed(overrides, errors.text_keys() | options, errors.list_keys(), errors.mappings())
    if len(files.folders) > 1:
        arguments.append(override_text.assign("hydra.searchpath", [f"file://{folder}" for folder in files.folders[1:]]))
    try:
        groups.check_yaml(files)
        composed = hydra_call.compose(files.folders[0], arguments)
        raw = OmegaConf.to_container(composed, resolve=False)
        called = list(_check_resolvers(raw))
        data = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        backend = _backend(files, arguments) if "cluster." in str(error) else None
        raise errors.from_hydra(error, files, overrides, backend) from error
    if not isinstance(data, dict) or not isinstance(raw, dict):
        raise UserError(f"{files.folders[0]}/config.yaml: not a mapping of keys")
    return {str(key): value for key, value in raw.items()}, _as_text(data), called


def _as_text(data: dict[Any, Any]) -> dict[str, Any]:
    """With those numbers as text that people write for text."""
    section = data.get("cluster")
    if isinstance(section, dict):
        resources = section.get("resources")
        for place in (section, resources if isinstance(resources, dict) else {}):
            for key in _NUMBER_AS_TEXT if place is section else list(place):
                if type(place.get(key)) in (int, float):
                    place[key] = str(place[key])
    return {str(key): value for key, value in data.items()}


def _backend(files: groups.Groups, arguments: list[str]) -> str | None:
    """The backend that the chosen groups give, where single keys cannot be composed."""
    from hydra.errors import HydraException

    chosen = {*files.options(), "hydra.searchpath"}
    try:
        groups.check_yaml(files)
        composed = hydra_call.compose(
            files.folders[0], [text for text in arguments if override_text.key_of(text) in chosen]
        )
    except HydraException:
        return None  # the groups are wrong too; the first error is reported without it
    return str(composed.cluster.backend)


def _check_resolvers(value: Any, key: str = "") -> Iterator[str]:
    """Names of the resolvers that composed data calls. Raises :class:`UserError` for one that reads the environment."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _check_resolvers(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            yield from _check_resolvers(item, key)
    elif isinstance(value, str):
        for name in override_text.resolver_calls(value):
            if name in ("oc.env", "env") or "$" in name:
                raise UserError(
                    f"{key}={value}: values of the environment are not written into a run; name the variable in "
                    "secrets=[NAME], or give its value as env.NAME=value"
                )
            yield name


def to_yaml(data: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120))
