"""Tables in Markdown and LaTeX, and numbers with their intervals as these show them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ABSENT = "-"
NAMED = {"\\": "backslash", "~": "asciitilde", "^": "asciicircum", "<": "less", ">": "greater", "|": "bar",
         "`": "asciigrave"}  # fmt: skip
TEX = str.maketrans({c: f"\\{c}" for c in "{}$&#_%"} | {c: f"{{{c}}}" for c in "[]"} | {"−": "$-$"}
                    | {c: rf"\text{name}{{}}" for c, name in NAMED.items()})  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Iterable[Any]], left: int = 1) -> str:
    """A table whose first `left` columns are texts; what follows stands to the right, as numbers do."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def latex(head: Sequence[str], rows: Iterable[Iterable[Any]], left: int = 1) -> str:
    """The same as a `tabular` with the lines of booktabs; every character of a cell stands for itself."""
    first, *lines = (" & ".join(tex(str(cell)) for cell in cells) + r" \\" for cells in [head, *rows])
    begin = rf"\begin{{tabular}}{{{'l' * left}{'r' * (len(head) - left)}}}"
    return "\n".join([begin, r"\toprule", first, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}"])


def tex(text: str) -> str:
    """A text as LaTeX prints it, with a minus before negative numbers."""
    text = re.sub(r"(?<![\w.-])-(?=\d)", "−", " ".join(text.split()))
    return re.sub("-(?=-)", "-{}", text.translate(TEX))


def number(value: Any, form: str = ".1f", scale: float = 100) -> str:
    """A number in per cent, never -0.0; "-" for what is none."""
    return format(round(scale * value, 9) + 0.0, form) if isinstance(value, int | float) else ABSENT


def interval(found: Mapping[str, Any] | None, name: str = "mean", form: str = ".1f", scale: float = 100) -> str:
    """A number with its interval, "84.7 [84.4, 84.9]"; alone where `low` is None, "-" where nothing was found."""
    if not found:
        return ABSENT
    value, low, high = (number(found[key], form, scale) for key in (name, "low", "high"))
    return value if low == ABSENT else f"{value} [{low}, {high}]"
