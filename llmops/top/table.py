"""A table whose cursor stays on its row, whatever happens to the others."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text
from textual.binding import Binding
from textual.widgets import DataTable

from llmops.top.cells import Column, Described, Look, cells


class KeyedTable(DataTable[Text]):
    """Rows are known by a key. Only cells that have changed are drawn anew."""

    BINDINGS = [  # noqa: RUF012
        Binding("enter", "select_cursor", "open", key_display="Enter"),
        Binding("j", "cursor_down", show=False),
        Binding("k", "cursor_up", show=False),
        Binding("g,home", "scroll_top", show=False),
        Binding("G,end", "scroll_bottom", show=False),
    ]

    def __init__(self) -> None:
        super().__init__(cursor_type="row", zebra_stripes=False, cursor_foreground_priority="renderable")
        self._shown: dict[str, list[Text]] = {}
        self._heads: list[tuple[str, str, int]] = []

    @property
    def selected(self) -> str | None:
        """The key of the row under the cursor."""
        keys = list(self._shown)
        return keys[self.cursor_row] if 0 <= self.cursor_row < len(keys) else None

    def show(
        self, columns: Sequence[tuple[Column, int]], rows: Sequence[tuple[str, Described]], look: Look, mark: str = ""
    ) -> None:
        """Show exactly these rows in this order. ``mark``: the title of this column says that it decides the order."""
        sign = "v" if look.ascii_only else "▾"
        heads = [
            (column.key, f"{column.title}{sign if column.key == mark else ''}", width) for column, width in columns
        ]
        made = {key: cells(row, columns, look) for key, row in rows}
        if heads == self._heads and list(made) == list(self._shown):
            self._update(made)
        else:
            self._rebuild(columns, heads, made)
        self._shown, self._heads = made, heads

    def _update(self, made: dict[str, list[Text]]) -> None:
        for key, new in made.items():
            for (column, _, _), before, after in zip(self._heads, self._shown[key], new, strict=True):
                if (before.plain, before.style, before.spans) != (after.plain, after.style, after.spans):
                    self.update_cell(key, column, after)

    def _rebuild(
        self, columns: Sequence[tuple[Column, int]], heads: list[tuple[str, str, int]], made: dict[str, list[Text]]
    ) -> None:
        at, row, scroll = self.selected, self.cursor_row, self.scroll_y
        self.clear(columns=heads != self._heads)
        if heads != self._heads:
            for (column, _), (key, title, width) in zip(columns, heads, strict=True):
                self.add_column(
                    Text(title, justify="right" if column.right else "left", no_wrap=True, end=""), key=key, width=width
                )
        for key, new in made.items():
            self.add_row(*new, key=key)
        keys = list(made)
        if keys:
            self.move_cursor(row=keys.index(at) if at in made else min(row, len(keys) - 1), scroll=False)
            self.scroll_to(y=scroll, animate=False, immediate=True)
            self.call_after_refresh(self._scroll_cursor_into_view)
