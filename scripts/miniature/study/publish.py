"""Puts a finished study into the repository: `python -m scripts.miniature.study.publish --study DIR`.

Copies its results.json and tables to scripts/miniature/results/, draws the figures there, and writes the README's block
between its two marks. Without --study all is made again from the results.json that is there.
"""

import argparse
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llava.runtime import ArgumentParser, user_errors, write_bytes, write_text
from scripts.miniature.study.report import TITLES, draw_all
from scripts.miniature.study.results import HOW
from scripts.miniature.study.running import ROOT
from scripts.miniature.study.tables import (
    MAIN_GROUPS,
    RESULT_HEAD,
    Table,
    as_markdown,
    comparison_table,
    entries,
    markdown,
    result_row,
    sanity_table,
    summary,
)

FOLDER = Path("scripts/miniature/results")
README = Path("README.md")
START, END = "<!-- study: written by scripts.miniature.study.publish -->", "<!-- end of study -->"
FIGURES = ("accuracy", "ratio")
SHOWN = (0, 3, 4, 5, 6, 7)  # columns of the result table
COMPARED = (0, 2, 3, 4)  # of the comparisons


def main() -> None:
    """Copies, draws and writes."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--study", type=Path, help="folder of the study (default: the results in the repository)")
    args = parser.parse_args()
    source = args.study / "results.json" if args.study else ROOT / FOLDER / "results.json"
    with user_errors():
        if not source.is_file():
            raise FileNotFoundError(f"{source}: no such file; python -m scripts.miniature.study writes it")
        results = json.loads(source.read_text(encoding="utf-8"))
        drawn = draw_all(results)
        readme = with_block((ROOT / README).read_text(encoding="utf-8"), block(results, drawn))
    write_text(ROOT / FOLDER / "results.json", json.dumps(results, separators=(",", ":")) + "\n")
    write_text(ROOT / FOLDER / "results.md", markdown(results))
    for name, picture in drawn.items():
        write_bytes(ROOT / FOLDER / f"{name}.png", picture)
    write_text(ROOT / README, readme)


def with_block(readme: str, text: str) -> str:
    """The README with the text between the marks. Raises ValueError if it lacks them."""
    if readme.count(START) != 1 or readme.count(END) != 1 or readme.index(START) > readme.index(END):
        raise ValueError(f"{README}: it must have the lines {START!r} and {END!r}, once each, in this order")
    return readme[: readme.index(START)] + f"{START}\n\n{text}\n\n{END}" + readme.split(END, 1)[1]


def block(results: Mapping[str, Any], drawn: Collection[str] = FIGURES) -> str:
    """What was run, the main table, the comparisons that the question is about, and of the plots `drawn` two."""
    rows = [result_row(results, entry) for entry in entries(results, MAIN_GROUPS, tuple(HOW))]
    compared = comparison_table(results, MAIN_GROUPS)
    without = Table("", "", compared.head, [row for row in compared.rows if "AdaptViz" not in row[0]])
    found = [
        summary(results),
        as_markdown(_columns(Table("", "", RESULT_HEAD, rows), SHOWN)),
        as_markdown(_columns(without, COMPARED)),
    ]
    same = sanity_table(results)
    if same.rows:
        found.append("Knobs that must do nothing (λ = 0) gave the same adapter, byte for byte: "
                     + ", ".join(f"{row[0]}: {row[3]}" for row in same.rows) + ".")  # fmt: skip
    found += [f"![{TITLES[name]}]({FOLDER / f'{name}.png'})" for name in FIGURES if name in drawn]
    return "\n\n".join([*found, f"All tables: [results.md]({FOLDER / 'results.md'})."])


def _columns(table: Table, kept: tuple[int, ...]) -> Table:
    return Table(table.title, table.note, [table.head[i] for i in kept], [[row[i] for i in kept] for row in table.rows])


if __name__ == "__main__":
    main()
