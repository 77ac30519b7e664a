"""What is typed arrives as typed."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from llmops.config.compose import load_config
from llmops.config.overrides import as_typed, assign, resolver_calls
from llmops.config.schema import SlurmCluster

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
TRICKY = st.text(st.sampled_from("\\'\"${}[](),:= ab\n\t"), max_size=12)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TRICKY,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


def parsed(override: str) -> Any:
    value = OverridesParser.create().parse_override(override).value()
    container = OmegaConf.create({"key": value})
    return OmegaConf.to_container(container, resolve=True)["key"]  # type: ignore[call-overload,index]


@given(TEXT | TRICKY)
@example("\\${a}")
@example("\\\\${oc.env:HOME}\\")
@example("\\'")
def test_assigned_text_arrives(text: str) -> None:
    assert parsed(assign("key", text)) == text


@given(VALUES)
def test_assigned_values_arrive(value: Any) -> None:
    assert parsed(assign("key", value)) == value


@given(TEXT | TRICKY)
def test_text_keys_take_text_as_typed(text: str) -> None:
    typed = f"name={text}"
    (override,) = as_typed([typed], {"name"})
    if "${" in text:
        return  # an interpolation, as in a file
    if override == typed:
        assert text in ("", "null") or (text[0] == text[-1] and text[0] in "'\"")
    else:
        assert parsed(override) == text


def test_not_a_number_in_an_override() -> None:
    with pytest.raises(ValueError, match="nan"):
        assign("key", float("nan"))
    with pytest.raises(TypeError, match="set"):
        assign("key", {1})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("${a.b}", []),
        ("${oc.env:HOME}", ["oc.env"]),
        ("x ${ oc.env : HOME } ${now:%d}", ["oc.env", "now"]),
        ("${oc.select:a,${oc.env:X}}", ["oc.select", "oc.env"]),
        ("${${x}.env:HOME}", ["${x}.env"]),
        ("\\${oc.env:HOME}", []),
        ("a:b}", []),
        ("${a}:b", []),
    ],
)
def test_resolver_calls(text: str, names: list[str]) -> None:
    assert resolver_calls(text) == names


def test_slurm_names_need_no_quotes() -> None:
    typed = {
        "partition": "gpu,long",
        "account": "0123",
        "nodelist": "n[1-3],n7",
        "constraint": "h100&ib",
        "gres": "nvme:1",
        "comment": "it's 50% (or so) = fine",
        "time": "2:00:00",
        "mem": "64000",
        "dependency": "afterok:12:34",
    }
    config = load_config(["cluster=slurm", *(f"cluster.{key}={value}" for key, value in typed.items())]).config
    assert isinstance(config.cluster, SlurmCluster)
    assert {key: getattr(config.cluster, key) for key in typed} == typed


def test_lists_of_text_need_no_quotes() -> None:
    config = load_config(["command=[python, train.py, --lr=1e-3, 007, true]", "secrets=[HF_TOKEN]"]).config
    assert config.command == ["python", "train.py", "--lr=1e-3", "007", "true"]
    assert config.secrets == ["HF_TOKEN"]


def test_env_is_text() -> None:
    config = load_config(["env.A=1", "env.B=a=b,c", "+env.C='x y'", "env.D="]).config
    assert config.env == {"A": "1", "B": "a=b,c", "C": "x y", "D": ""}


def test_command_arrives_exactly() -> None:
    argv = ["bash", "-c", "echo ${HOME:-none} 'a' \"b\" \\", "${train.lr}", "", "a,b", "[x]", "null"]
    assert load_config([assign("command", argv)]).config.command == argv
