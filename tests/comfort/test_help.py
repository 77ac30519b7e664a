"""``--help`` shows examples, and each of them works."""

from __future__ import annotations

import re
import shlex

import pytest

from llmops.api import all_overrides
from llmops.cli import ckpt
from llmops.cli.examples import EXAMPLES
from llmops.cli.main import ACTIONS, EPILOG, VERBS, main, parse
from llmops.config.compose import load_config

ALL = [*VERBS, *(f"{verb} {action}" for verb, actions in ACTIONS.items() for action in actions)]
ALL += [f"ckpt {action}" for action in ckpt.ACTIONS]
LINES = [(verb, line.strip()) for verb, text in EXAMPLES.items() for line in text.splitlines()]
LINES += [(line.split()[1], line.strip()) for line in EPILOG.splitlines()[1:]]


def words(line: str) -> list[str]:
    """The arguments of an example; what is around the command is the shell's."""
    inside = re.fullmatch(r"source <\((.*)\)", line)
    return shlex.split((inside[1] if inside else line).partition(" > ")[0])[1:]


def test_every_verb_has_examples() -> None:
    assert set(EXAMPLES) == set(ALL)


@pytest.mark.parametrize("verb", ALL)
def test_help_ends_with_them(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([*verb.split(), "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert shown.endswith(f"\nexamples:\n{EXAMPLES[verb]}")
    assert all(len(line) <= 80 for line in EXAMPLES[verb].splitlines())


@pytest.mark.parametrize(("verb", "line"), LINES)
def test_an_example_is_understood(verb: str, line: str) -> None:
    parsed = parse(words(line))
    assert verb.startswith(parsed.verb)
    if parsed.verb in ("submit", "plan", "render"):
        load_config(all_overrides(parsed.overrides, parsed.backend, None, parsed.command))
