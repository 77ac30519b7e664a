"""A timeline and its shares in characters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from llmops.monitor.text import duration, moment, percent

# What people tell apart at a glance: the parts of start-up are one.
GROUPS = {
    "queue": "queued",
    "import": "starting",
    "rendezvous": "starting",
    "load": "starting",
    "train": "training",
    "uncommitted": "not committed yet",
    "checkpoint": "saving",
    "lost": "lost",
    "hang": "stalled",
    "idle": "idle",
}
# Each has a sign of its own: colours alone are lost in a pipe, and to many eyes.
SIGNS = {
    "queued": ("░", "q", "bright_black"),
    "starting": ("▒", "s", "cyan"),
    "training": ("█", "#", "green"),
    "not committed yet": ("▓", "+", "green"),
    "saving": ("▤", "c", "blue"),
    "lost": ("╳", "x", "red"),
    "stalled": ("!", "!", "magenta"),
    "idle": ("·", ".", "bright_black"),
}


def lines(timeline: Sequence[Mapping[str, Any]], width: int, ascii_only: bool = False) -> list[Text]:
    """The timeline in ``width`` cells, where attempts begin, when it begins and ends, and what its signs mean."""
    return [
        bar(timeline, width, ascii_only),
        starts(timeline, width),
        axis(timeline, width),
        legend(timeline, ascii_only),
    ]


def bar(timeline: Sequence[Mapping[str, Any]], width: int, ascii_only: bool = False) -> Text:
    """The timeline in ``width`` cells, each of which shows what most of its time went to."""
    start, end = timeline[0]["start"], timeline[-1]["end"]
    text = Text()
    if end <= start:
        return text
    for cell in range(width):
        low = start + (end - start) * cell / width
        high = start + (end - start) * (cell + 1) / width
        spent: dict[str, float] = {}
        for span in timeline:
            inside = min(span["end"], high) - max(span["start"], low)
            if inside > 0:
                group = GROUPS[span["kind"]]
                spent[group] = spent.get(group, 0.0) + inside
        if not spent:
            text.append(" ")
            continue
        sign, plain, style = SIGNS[max(spent, key=lambda group: spent[group])]
        text.append(plain if ascii_only else sign, style=style)
    return text


def starts(timeline: Sequence[Mapping[str, Any]], width: int) -> Text:
    """The numbers of attempts where they begin; one that has no room beside the one before is left out."""
    first, last = timeline[0]["start"], timeline[-1]["end"]
    text, seen = "", set[int]()
    for span in timeline:
        number = span["attempt"]
        if number is None or number in seen or last <= first:
            continue
        seen.add(number)
        at = min(int((span["start"] - first) / (last - first) * width), width - 1)
        if at > len(text) or not text:
            text = text.ljust(at) + str(number)
    return Text(text[:width], style="bright_black", no_wrap=True)


def legend(timeline: Sequence[Mapping[str, Any]], ascii_only: bool = False) -> Text:
    """Each sign with its meaning and how long it took in all."""
    spent: dict[str, float] = {}
    for span in timeline:
        group = GROUPS[span["kind"]]
        spent[group] = spent.get(group, 0.0) + span["end"] - span["start"]
    text = Text()
    for group, (sign, plain, style) in SIGNS.items():
        if group in spent:
            text.append("  " if text else "")
            text.append(plain if ascii_only else sign, style=style)
            text.append(f" {group} {duration(spent[group])}")
    return text


def axis(timeline: Sequence[Mapping[str, Any]], width: int) -> Text:
    """When it begins and ends, below the bar."""
    first, last = moment(timeline[0]["start"]), moment(timeline[-1]["end"])
    gap = width - len(first) - len(last)
    return Text(first + " " * gap + last if gap > 0 else first, style="bright_black")


def shares(found: Mapping[str, float]) -> str:
    """``committed 87%, start-up 6%, queue 4%``: what is worth a word, the largest first."""
    merged: dict[str, float] = {}
    for name, share in found.items():
        group = "start-up" if name in ("import", "rendezvous", "load") else name
        merged[group] = merged.get(group, 0.0) + share
    told = sorted(((share, name) for name, share in merged.items() if share >= 0.0005), reverse=True)
    return ", ".join(f"{name} {percent(share)}" for share, name in told)
