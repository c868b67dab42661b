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
from scripts.miniature.study.config import Arm, parse_config
from scripts.miniature.study.report import TITLES, draw_all
from scripts.miniature.study.results import HOW
from scripts.miniature.study.running import ROOT
from scripts.miniature.study.tables import (
    ABSENT,
    MAIN_GROUPS,
    Table,
    as_markdown,
    comparison_table,
    confirmed_table,
    find,
    markdown,
    number,
    percent,
    sanity_table,
    summary,
)
from scripts.miniature.study.units import PLAIN

FOLDER = Path("scripts/miniature/results")
README = Path("README.md")
START, END = "<!-- study: written by scripts.miniature.study.publish -->", "<!-- end of study -->"
FIGURES = ("accuracy", "ratio")
COMPARED = (0, 2, 3, 4, 6)  # columns of the comparisons


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
    """What was run, a row for every arm of all seeds, what was varied (folded), and of the plots `drawn` two."""
    found = [summary(results), as_markdown(arms_table(results))]
    groups = {arm["group"] for arm in results["arms"].values()} - set(MAIN_GROUPS)
    others = {key: [own for own in results[key] if own["first"][0] != "base"] for key in ("comparisons", "confirmed")}
    fresh = confirmed_table({**results, **others})
    if fresh.rows:
        found.append(f"{fresh.title} on which nothing had been chosen "
                     f"({results['config']['confirm']['num_test']} questions):\n\n{narrowed(fresh)}")  # fmt: skip
    varied = comparison_table({**results, **others}, sorted(groups))
    if varied.rows:
        title = f"What was varied ({len(varied.rows)} comparisons)"
        found.append(f"<details><summary>{title}</summary>\n\n{narrowed(varied)}\n\n</details>")
    same = sanity_table(results)
    if same.rows:
        found.append("Knobs that must do nothing (λ = 0) gave the same adapter, byte for byte: "
                     + ", ".join(f"{row[0]}: {row[3]}" for row in same.rows) + ".")  # fmt: skip
    found += [f"![{TITLES[name]}]({FOLDER / f'{name}.png'})" for name in FIGURES if name in drawn]
    return "\n\n".join([*found, f"All tables: [results.md]({FOLDER / 'results.md'})."])


def narrowed(table: Table) -> str:
    """Comparisons in Markdown, with the columns that a README has room for."""
    rows = [[row[i] for i in COMPARED] for row in table.rows]
    return as_markdown(Table("", "", [table.head[i] for i in COMPARED], rows))


def arms_table(results: Mapping[str, Any]) -> Table:
    """A row for every arm that has all seeds: accuracy, against the base and against itself without the term, ratio."""
    rows, arms = [], parse_config(results["config"]).arms
    for name, arm in results["arms"].items():
        is_main = arm["group"] in MAIN_GROUPS or arm["seeds"] == results["config"]["seeds"]
        if not is_main or PLAIN not in arm["ways"]:
            continue
        numbers = arm["ways"][PLAIN]
        control = without_the_term(arms, name)
        base, term = (first and find(results, (first, PLAIN), (name, PLAIN)) for first in ("base", control))
        steered = [percent(arm["ways"].get(way, {}).get("mean"), bare=True) for way in HOW if way != PLAIN]
        rows.append([
            arm["label"], percent(numbers.get("mean")), percent(base["mean"]["relative"], "+.1f") if base else ABSENT,
            f"{percent(term['mean']['over_seeds'], '+.1f')}, p {term['mean']['p']:.2g}" if term else ABSENT,
            percent(numbers["begins"], bare=True) + (f" ({percent(term['mean']['begins'], '+.1f')})" if term else ""),
            *steered, percent(numbers.get("format/single"), bare=True), number(numbers.get("ratio"), ".2f", bare=True),
        ])  # fmt: skip
    head = ("", "accuracy %", "over the base, relative %", "over the same arm without the term, points",
            "begins right % (over the same arm, points)", "with AdaptViz %", "AdaptViz tuned %", "single image %",
            "attention ratio")  # fmt: skip
    return Table("", "", head, rows)


def without_the_term(arms: Mapping[str, Arm], name: str) -> str | None:
    """The arm of the main table that has the same losses but the attention term, None if there is none."""

    def losses(arm: Arm) -> dict[str, float | None]:
        return {flag: arm.flags.get(flag) for flag in ("dpo_alpha", "gamma")}

    if not arms[name].flags.get("attention_weight"):
        return None
    plain = (arm for arm in arms.values() if arm.flags.get("attention_weight") == 0 and arm.group == "main")
    return next((arm.name for arm in plain if losses(arm) == losses(arms[name])), None)


if __name__ == "__main__":
    main()
