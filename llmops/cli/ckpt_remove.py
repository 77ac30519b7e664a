"""``llmops ckpt gc`` and ``rm``: shown first, removed after."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llm.checkpoint.retention import Retention
from llmops.checkpoints.change import Removal, held, plan_gc, remove, remove_expired_leases
from llmops.checkpoints.survey import Survey
from llmops.checkpoints.target import resolve
from llmops.errors import UserError
from llmops.monitor.checkpoints import render_removals, size


def run(arguments: argparse.Namespace) -> int:
    """Remove what is to be removed."""
    return gc(arguments) if arguments.action == "gc" else rm(arguments)


def gc(arguments: argparse.Namespace) -> int:
    """What no rule keeps."""
    try:
        keep = Retention(keep_last=arguments.keep_last, keep_every=arguments.keep_every, keep_best=arguments.keep_best)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from error
    target = resolve(arguments.ref, arguments.runs_url)
    if target.selector is not None:
        raise UserError(f"{arguments.ref}: gc is for a whole run; `llmops ckpt rm` removes one checkpoint")
    survey = Survey(target)
    removals = plan_gc(survey, keep)
    leases = len(survey.expired_leases)
    if not removals and not leases:
        print("nothing to remove")
        return 0
    _show(removals)
    if leases:
        print(f"and {leases} expired lease{'s' if leases > 1 else ''}")
    stay = len(survey.entries) - len(removals)
    if not _confirmed(arguments.yes, f"{_total(removals)} would go, {stay} stay"):
        return 0
    _remove(survey, removals, force=False)
    remove_expired_leases(survey)
    return 0


def rm(arguments: argparse.Namespace) -> int:
    """The ones that are named."""
    chosen: dict[str, tuple[Survey, list[Removal]]] = {}
    for ref in arguments.refs:
        target = resolve(ref, arguments.runs_url)
        if target.selector is None:
            raise UserError(f"{ref}: say which checkpoint, as in {ref}@STEP; `llmops ckpt ls` lists them")
        if target.url not in chosen:
            chosen[target.url] = Survey(target), []
        survey, removals = chosen[target.url]
        entry = survey.choose(target.selector, uncommitted=True)
        reason = held(survey, entry)
        if reason and not arguments.force:
            raise UserError(f"{entry.name} {reason}; --force removes it all the same")
        if all(each.entry != entry for each in removals):
            removals.append(Removal(entry, reason or ("" if entry.committed else "was never committed")))
    everything = [removal for _, removals in chosen.values() for removal in removals]
    _show(everything)
    if not _confirmed(arguments.yes, f"{_total(everything)} would go"):
        raise UserError("nothing was removed; --yes removes without asking")
    for survey, removals in chosen.values():
        _remove(survey, removals, arguments.force)
    return 0


def _show(removals: Sequence[Removal]) -> None:
    if removals:
        from rich.console import Console

        render_removals([(each.entry.name, each.entry.bytes, each.why) for each in removals], Console())


def _total(removals: Sequence[Removal]) -> str:
    count = len(removals)
    return f"{count} checkpoint{'' if count == 1 else 's'}, {size(sum(each.entry.bytes for each in removals))},"


def _confirmed(yes: bool, what: str) -> bool:
    """Whether to go on: by --yes, or because somebody at a terminal says so."""
    if yes:
        return True
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print(f"{what}; --yes removes")
        return False
    try:
        return input(f"{what}; remove? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def _remove(survey: Survey, removals: Sequence[Removal], force: bool) -> None:
    for removal, gone in remove(survey, removals, force):
        entry = removal.entry
        print(
            f"removed {entry.name}, {size(entry.bytes)}" if gone else f"kept {entry.name}: tagged or read a moment ago"
        )
