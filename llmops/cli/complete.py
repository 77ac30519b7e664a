"""``llmops __complete``: what TAB gives. The scripts in ``shells/`` ask at every TAB, so it imports next to nothing.

Options, keys and their values come from an index that is kept (:mod:`llmops.cli.complete_index`), names of runs from
:mod:`llmops.cli.complete_names`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from llmops.cli import complete_index
from llmops.cli.complete_index import Index, Spec

Found = list[tuple[str, str]]  # what completes the word, and what it is
FILES = "files"  # instead: files complete it, or "dirs" do
NAMED = ("run", "study", "any")
# Where a word that ends so may go on, no blank follows it.
OPEN_ENDS = ("=", ".", "/", "@", ",")


def answer(argv: list[str]) -> int:
    """Print the answer for one shell: a line that says who completes (``words``, ``files`` or ``dirs``), then words."""
    shell, *rest = argv
    if shell == "bash":
        line, breaks = rest
        words, current, cut, quote = split(line, breaks)
    elif shell == "fish":
        *words, raw = rest
        words, current = words[1:], split(f"llmops {raw}", "")[1]
    else:
        words, current = rest[1:-1], rest[-1]
    found, who = complete(words, current)
    found = [(word, what) for word, what in found if word.startswith(current)]
    print(who)
    if shell == "bash":
        for word, _ in found:
            print(_for_bash(word[cut:], quote))
    else:
        for word, what in found:
            print(f"{word}\t{what}" if what else word)
    return 0


def complete(words: list[str], current: str) -> tuple[Found, str]:
    """What may stand in place of ``current`` after ``words``, those after ``llmops``; and who completes it."""
    index = complete_index.load()
    if "--" in words:
        return [], FILES
    verb, after = _first(words)
    if verb is None:
        tops = [("--help", "show help"), ("--version", "print the version")] if current.startswith("-") else []
        return tops + [(name, spec["help"]) for name, spec in index["verbs"].items()], "words"
    spec = index["verbs"].get(verb)
    if spec is None:
        return [], FILES
    actions: dict[str, Spec] = spec.get("actions", {})
    chosen, rest = _first(after) if actions else (None, after)
    offered: Found = []
    if chosen in actions:
        spec, after = actions[chosen], rest
    elif actions and chosen is None:
        offered = [(name, each["help"]) for name, each in actions.items()]
    given, pending = _read(spec, after)
    if pending is not None:
        return _of_kind(index, pending, current, words)
    option, equals, value = current.partition("=")
    if current.startswith("--") and equals:
        kind = next((each["kind"] for each in spec["options"] if option in each["names"]), None)
        found, who = _of_kind(index, kind, value, words)
        return [(f"{option}={word}", what) for word, what in found], who
    if current.startswith("-"):
        return [
            (name, each["help"]) for each in spec["options"] for name in each["names"] if name.startswith("--")
        ], "words"
    places = spec["places"]
    if not places or (given >= len(places) and not places[-1]["many"]):
        return offered, "words"
    found, who = _of_kind(index, places[min(given, len(places) - 1)]["kind"], current, words)
    return offered + found, who


def split(line: str, breaks: str) -> tuple[list[str], str, int, str]:
    """A line of a shell up to the cursor: the words after the command, the word at the cursor without its quotes, how
    much of it the shell keeps since it ends with one of ``breaks``, and the quote that is open.
    """
    words: list[str] = []
    word, begun, quote, cut, at = "", False, "", 0, 0
    while at < len(line):
        letter = line[at]
        if quote:
            if letter == quote:
                quote = ""
            elif letter == "\\" and quote == '"' and line[at + 1 : at + 2] in ('"', "\\", "$", "`"):
                at += 1
                word += line[at]
            else:
                word += letter
        elif letter in "'\"":
            quote, begun, cut = letter, True, len(word)
        elif letter == "\\":
            at += 1
            word, begun = word + line[at : at + 1], True
        elif letter in " \t\n":
            if begun:
                words.append(word)
            word, begun, cut = "", False, 0
        else:
            word, begun = word + letter, True
            if letter in breaks:
                cut = len(word)
        at += 1
    start = next((number for number, each in enumerate(words) if os.path.basename(each) == "llmops"), 0)  # noqa: PTH119 - pathlib costs more than the rest
    return words[start + 1 :], word, cut, quote


def _for_bash(word: str, quote: str) -> str:
    """A word as bash has to insert it: quoted, and with the blank that follows it."""
    if quote == "'":
        return word.replace("'", "'\\''")
    if quote == '"':
        return re.sub(r'(["\\$`])', r"\\\1", word)
    end = "" if word.endswith(OPEN_ENDS) else " "
    return re.sub(r"([^\w@%+=:,./-])", r"\\\1", word) + end


def _first(words: list[str]) -> tuple[str | None, list[str]]:
    """The first word that is no option, and what follows it."""
    at = next((number for number, word in enumerate(words) if not word.startswith("-")), None)
    return (None, words) if at is None else (words[at], words[at + 1 :])


def _read(spec: Spec, words: Iterable[str]) -> tuple[int, str | list[str] | None]:
    """How many arguments are given already, and the kind of value that the last option still wants."""
    given, pending = 0, None
    for word in words:
        if pending is not None:
            pending = None
        elif word.startswith("-"):
            if not (word.startswith("--") and "=" in word):
                pending = next((each["kind"] for each in spec["options"] if word in each["names"]), None)
        else:
            given += 1
    return given, pending


def _of_kind(index: Index, kind: str | list[str] | None, current: str, words: list[str]) -> tuple[Found, str]:
    """What completes a value of this kind: one of a list, a run, a study, either (``any``), an override, a file."""
    if isinstance(kind, list):
        return [(value, "") for value in kind], "words"
    if kind == "override":
        return _overrides(index, current, words)
    if kind in NAMED:
        from llmops.cli.complete_names import names

        return names(kind, _option(words, "--runs-url"), current), "words"
    return [], kind if kind in (FILES, "dirs") else "words"


def _overrides(index: Index, current: str, words: list[str]) -> tuple[Found, str]:
    bare = current.lstrip("+~")
    sign = current[: len(current) - len(bare)]
    name, equals, value = bare.partition("=")
    groups = complete_index.groups(index, _option(words, "--config-dir"))
    if not equals:
        found = [(f"{group}=", "a group: one of its files") for group in groups]
        return [(sign + word, what) for word, what in found + _keys(index, bare, words)], "words"
    options: Found
    if name in groups:
        options = list(groups[name].items())
    else:
        key = index["keys"].get(name)
        if key is None or (not key["values"] and key["text"]):
            return [], FILES
        options = [(each, "") for each in key["values"]]
    head = ""
    if "sweep" in words[:1]:  # where a key may have several values
        before, comma, _ = value.rpartition(",")
        head = before + comma
    return [(f"{sign}{name}={head}{option}", what) for option, what in options], "words"


def _keys(index: Index, start: str, words: list[str]) -> Found:
    """Keys up to the next dot: sections first show themselves, then what is in them."""
    backend = _option(words, "--backend") or next(
        (word.partition("=")[2] for word in reversed(words) if word.startswith("cluster=")), None
    )
    depth = start.count(".")
    found: dict[str, str] = {}
    for name, key in index["keys"].items():
        if not name.startswith(start) or (backend and key["clusters"] and backend not in key["clusters"]):
            continue
        parts = name.split(".")
        if len(parts) > depth + 1:
            found.setdefault(f"{'.'.join(parts[: depth + 1])}.", "a section")
        else:
            found[f"{name}="] = key["help"]
    return list(found.items())


def _option(words: list[str], name: str) -> str | None:
    """The value that an option has on the line so far."""
    for number, word in enumerate(words):
        if word == name and number + 1 < len(words):
            return words[number + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None
