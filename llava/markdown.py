"""Tables in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any


def row(cells: Iterable[Any]) -> str:
    """A line of a table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def table(head: Sequence[str], rows: Iterable[Iterable[Any]], left: int = 1) -> str:
    """A table whose first `left` columns are texts; what follows stands to the right, as numbers do."""
    return "\n".join(map(row, [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]))
