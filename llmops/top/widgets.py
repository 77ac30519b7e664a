"""Small parts of several screens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Center, Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Button, Footer, Input, Static

from llmops.monitor.feed import Seen
from llmops.monitor.text import clean, duration

ROOMY = 110


def freshness(seen: Seen[Any], interval_s: float, now: float) -> Text:
    """How old what is shown is, and what keeps it from being newer."""
    age = f"{duration(now - seen.taken)} ago" if seen.taken else ""
    if seen.trouble:
        shown = f"; shown: {age}" if age else ""
        return Text(f" not up to date: {clean(seen.trouble)}{shown}", style="bold red")
    if not seen.taken:
        return Text(" reading ...", style="yellow")
    return Text(
        f" every {interval_s:g} s, read {age}", style="green" if now - seen.taken < 3 * interval_s else "yellow"
    )


class Keys(Footer):
    """What keys do; closer together where the terminal is narrow."""

    def __init__(self) -> None:
        super().__init__(show_command_palette=False, compact=True)

    def on_resize(self, event: events.Resize) -> None:
        """There is room, or there is not."""
        self.compact = event.size.width < ROOMY


class Filter(Input):
    """A line to type in, which is there only while it is used or in force."""

    def __init__(self, hint: str) -> None:
        super().__init__(placeholder=hint, id="filter", compact=True, select_on_focus=False)
        self.display = False

    def open(self) -> None:
        """Show it, and type into it."""
        self.display = True
        self.focus()

    def leave(self, to: Widget) -> None:
        """Back to what is filtered; a filter that is in force stays to be seen."""
        self.display = bool(self.value)
        to.focus()


class Confirm(ModalScreen[str]):
    """A question, and the answers to choose from; the first one, which does nothing, has the focus."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,n,q", "answer('no')", show=False),
        Binding("left,up", "app.focus_previous", show=False),
        Binding("right,down", "app.focus_next", show=False),
    ]

    def __init__(self, question: str, about: str, answers: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._question, self._about, self._answers = question, about, answers

    def compose(self) -> ComposeResult:
        """The box."""
        with Vertical(id="box"):
            yield Static(Text(self._question, style="bold"), id="question")
            yield Static(Text(self._about), id="about")
            with Center(), Horizontal(id="answers"):
                yield Button("No", id="no", compact=True)
                for key, label in self._answers:
                    yield Button(label, id=key, compact=True, variant="error")

    def on_mount(self) -> None:
        """Nothing happens by a key that was pressed once too often."""
        self.query_one("#no").focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """The answer."""
        self.dismiss(event.button.id or "no")

    def action_answer(self, answer: str) -> None:
        """The answer of a key."""
        self.dismiss(answer)


class Help(ModalScreen[None]):
    """All keys."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark,enter", "app.pop_screen", show=False)]

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        """The box."""
        with VerticalScroll(id="box"):
            yield Static(Text(self._text))
