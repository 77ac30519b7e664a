"""``llmops ckpt tag``."""

from __future__ import annotations

import argparse

from llmops.checkpoints.change import add_tag, delete_tag
from llmops.checkpoints.survey import Survey
from llmops.checkpoints.target import resolve
from llmops.errors import UserError


def run(arguments: argparse.Namespace) -> int:
    """Give a name, or take it away."""
    target = resolve(arguments.ref, arguments.runs_url)
    if arguments.delete:
        if target.selector is not None:
            raise UserError(f"{arguments.ref}: a tag is deleted by its name alone; leave out what follows the @")
        delete_tag(target, arguments.name)
        print(f"{arguments.name} is no tag any more")
        return 0
    survey = Survey(target)
    entry = survey.choose(target.selector)
    add_tag(survey, entry, arguments.name)
    print(f"{arguments.name} is {entry.name}")
    return 0
