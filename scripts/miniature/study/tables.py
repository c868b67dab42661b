"""results.json as tables of text, which Markdown and the page both show."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava.runtime import short_commit
from scripts.miniature.study.results import HOW
from scripts.miniature.study.units import PLAIN

MAIN_GROUPS = ("main", "control")
LOOKED = {
    "looked_right_answered_right": "looked right, answered right",
    "looked_right_answered_wrong": "looked right, answered wrong",
    "looked_wrong_answered_right": "looked wrong, answered right",
    "looked_wrong_answered_wrong": "looked wrong, answered wrong",
}
ABSENT = "-"
SEVERAL = (
    "Arms of several commits are paired by seed only where these train the same weights: with another order of the "
    "pairs the same seed is another draw."
)


@dataclass(frozen=True)
class Table:
    """A title, what the numbers are, and cells."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Entry:
    """One arm answered in one way."""

    key: tuple[str, str]
    label: str
    arm: Mapping[str, Any]

    @property
    def numbers(self) -> Mapping[str, Any]:
        """By name mean, low, high and values."""
        return self.arm["ways"][self.key[1]]


def entries(results: Mapping[str, Any], groups: Sequence[str], ways: Sequence[str] = (PLAIN,)) -> list[Entry]:
    """Arms of the groups in the config's order, each in the ways it was answered."""
    return [
        Entry((name, way), arm["label"] + HOW[way], arm)
        for name, arm in results["arms"].items()
        for way in arm["ways"]
        if arm["group"] in groups and way in ways
    ]


def tables(results: Mapping[str, Any]) -> list[Table]:
    """All tables that have rows, in the order of the report."""
    every = entries(results, MAIN_GROUPS, tuple(HOW))
    found = [
        result_table(results),
        comparison_table(results, MAIN_GROUPS),
        confirmed_table(results),
        adaptviz_table(results),
        *(keyed_table(title, prefix, every) for title, prefix in (
            ("Accuracy by format", "format/"), ("Accuracy by number of images or cells", "images/"),
            ("Accuracy by position of the target", "position/"), ("Attention ratio by format", "ratio/"))),
        looked_table(every),
        keyed_table("Does the attention ratio tell right answers from wrong ones?", "auc/", every),
        *ablation_tables(results),
        validation_table(results),
        sanity_table(results),
        left_out_table(results),
    ]  # fmt: skip
    return [table for table in found if table.rows]


def result_table(results: Mapping[str, Any]) -> Table:
    """The main table."""
    rows = [result_row(results, entry) for entry in entries(results, MAIN_GROUPS)]
    return Table("Result", RESULT_NOTE, RESULT_HEAD, rows)


RESULT_HEAD = ("", "rate", "seeds", "mean of multi-image formats %", "relative to base %", "begins right %",
               "single image %", "attention ratio", "confusions % (chance)", "reward margin")  # fmt: skip
RESULT_NOTE = (
    "Mean over seeds [95 % interval]: Student's t over seeds, the data being the same; relative to base: seeds and "
    "questions resampled. Begins right: the answer begins with the true one, whatever follows; far above the accuracy, "
    "the model no longer ends its answers. Confusions: share of the wrong answers that are true of another image, and "
    "the same share when the wrong answers are dealt to one another's questions. Attention ratio: share of the image "
    "attention on the target, multi-image test prompts. Reward margin: end of training."
)


def result_row(results: Mapping[str, Any], entry: Entry) -> list[str]:
    """Cells below RESULT_HEAD."""
    numbers, arm = entry.numbers, entry.arm
    rate = f"{arm['learning_rate']:g}" if arm["learning_rate"] else ABSENT
    against_base = find(results, ("base", PLAIN), entry.key)
    relative = percent(against_base["mean"]["relative"], "+.1f") if against_base else ABSENT
    chance = percent(numbers.get("chance"), bare=True)
    return [
        entry.label, rate, str(len(arm["seeds"])), percent(numbers.get("mean")), relative, percent(numbers["begins"]),
        percent(numbers.get("format/single")), number(numbers.get("ratio")),
        f"{percent(numbers.get('confusion'))} ({chance})", number(arm["training"].get("rewards/margins"), ".2f"),
    ]  # fmt: skip


def find(results: Mapping[str, Any], first: tuple[str, str], second: tuple[str, str]) -> Mapping[str, Any] | None:
    """The comparison second - first, None if it was not made."""
    for comparison in results["comparisons"]:
        if (tuple(comparison["first"]), tuple(comparison["second"])) == (first, second) and "mean" in comparison:
            return comparison
    return None


def comparison_table(results: Mapping[str, Any], groups: Sequence[str]) -> Table:
    """Paired differences of the arms of some groups."""
    found = [own for own in results["comparisons"] if results["arms"][own["second"][0]]["group"] in groups]
    return Table("Paired comparisons", COMPARED_NOTE, COMPARED_HEAD, _compared(results, found))


def confirmed_table(results: Mapping[str, Any]) -> Table:
    """The same with the fresh seeds, on the fresh questions."""
    note = f"Trained with other seeds and asked other questions than anything was chosen on. {COMPARED_NOTE}"
    rows = _compared(results, results["confirmed"])
    return Table("Once more, with fresh seeds and questions", note, COMPARED_HEAD, rows)


COMPARED_HEAD = ("second - first", "seeds", "mean of multi-image formats, points", "resampled", "p", "relative %",
                 "begins right, points", "single image, points")  # fmt: skip
COMPARED_NOTE = (
    "Paired by seed and by question. Points [t interval over seeds]; resampled: 95 % of 10,000 draws of seeds and, "
    "within each format, questions; p: two-sided, of these draws."
)


def _compared(results: Mapping[str, Any], comparisons: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    arms = results["arms"]
    label = {(name, way): arm["label"] + HOW[way] for name, arm in arms.items() for way in HOW}
    return [[f"{label[tuple(own['second'])]} - {label[tuple(own['first'])]}", *_differences(own)]
            for own in comparisons]  # fmt: skip


def _differences(own: Mapping[str, Any]) -> list[str]:
    if "mean" not in own:
        return [str(len(own["seeds"])), *[ABSENT] * 6]
    mean, single = own["mean"], own.get("single")
    return [
        str(len(own["seeds"])), percent(mean["over_seeds"], "+.1f"),
        f"[{100 * mean['low']:+.1f}, {100 * mean['high']:+.1f}]", f"{mean['p']:.2g}",
        percent(mean["relative"], "+.1f"), percent(mean["begins"], "+.1f"),
        percent(single["over_seeds"], "+.1f") if single else ABSENT,
    ]  # fmt: skip


def adaptviz_table(results: Mapping[str, Any]) -> Table:
    """What steering adds to each arm."""
    rows = []
    for entry in entries(results, MAIN_GROUPS, [way for way in HOW if way != PLAIN]):
        own, base = (find(results, (name, PLAIN), entry.key) for name in (entry.key[0], "base"))
        gains = [percent(found["mean"]["relative"], "+.1f") if found else ABSENT for found in (own, base)]
        settings = entry.arm["adaptviz"] if entry.key[1].endswith("tuned") else "default"
        rows.append([entry.label, settings or ABSENT, percent(entry.numbers.get("mean")), *gains,
                     percent(entry.numbers.get("format/single"))])  # fmt: skip
    head = ("", "settings", "mean of multi-image formats %", "relative to the same arm %", "relative to base %",
            "single image %")  # fmt: skip
    return Table("AdaptViz", "Tuned: chosen on validation questions with the arm's first seed.", head, rows)


def keyed_table(title: str, prefix: str, found: Sequence[Entry]) -> Table:
    """The numbers whose names start with the prefix, one column each."""
    names = list(dict.fromkeys(name for entry in found for name in entry.numbers if name.startswith(prefix)))
    unit, show = KEYED.get(prefix, ("% of the questions", percent))
    rows = [[entry.label, *(show(entry.numbers.get(name)) for name in names)] for entry in found] if names else []
    note = f"{unit}, mean over seeds [t interval]."
    return Table(title, note, ["", *(name.removeprefix(prefix) for name in names)], rows)


def looked_table(found: Sequence[Entry]) -> Table:
    """Attention against correctness."""
    rows = [[entry.label, *(percent(entry.numbers.get(name)) for name in LOOKED)] for entry in found]
    note = "% of the multi-image answers. Looked right: the target has the largest share of the image attention."
    return Table("Where it looked, and what it answered", note, ["", *LOOKED.values()], rows)


def ablation_tables(results: Mapping[str, Any]) -> list[Table]:
    """Every other group: its arms beside the ones they vary, and the differences to these."""
    arms = results["arms"]
    groups = dict.fromkeys(arm["group"] for arm in arms.values() if arm["group"] not in MAIN_GROUPS)
    found = []
    for group in groups:
        compared = comparison_table(results, [group])
        beside = {name for own in results["comparisons"] if arms[own["second"][0]]["group"] == group
                  for name in own["first"][:1]}  # fmt: skip
        own = [entry for entry in entries(results, (*MAIN_GROUPS, group))
               if entry.arm["group"] == group or entry.key[0] in beside]  # fmt: skip
        note = "At the learning rate of the arm that is varied. Columns as of the result."
        found.append(Table(f"Varied: {group}", note, RESULT_HEAD, [result_row(results, entry) for entry in own]))
        found.append(Table(f"Varied: {group}, paired comparisons", compared.note, compared.head, compared.rows))
    return found


def validation_table(results: Mapping[str, Any]) -> Table:
    """Accuracy by learning rate, the chosen one marked."""
    found = results["validation"]
    rates = list(next(iter(found.values()), {}))
    rows = []
    for name, by_rate in found.items():
        chosen = results["arms"].get(name, {}).get("learning_rate")
        cells = [ABSENT if v is None else f"{100 * v:.1f}" + (" (chosen)" if float(r) == chosen else "")
                 for r, v in by_rate.items()]  # fmt: skip
        rows.append([results["arms"].get(name, {}).get("label", name), *cells])
    note = "Mean accuracy (%) of the multi-image formats on validation questions, first seed."
    return Table("Learning rates", note, ["", *(f"{float(rate):g}" for rate in rates)], rows)


def sanity_table(results: Mapping[str, Any]) -> Table:
    """Adapters that must have the same bytes."""
    rows = [[own["label"], own["same_as"], str(own["seed"]), "yes" if own["is_same"] else "NO"]
            for own in results["sanity"]]  # fmt: skip
    return Table("Sanity", "Knobs that must do nothing.", ["", "arm", "seed", "same adapter bytes"], rows)


def left_out_table(results: Mapping[str, Any]) -> Table:
    """Arms that were not run, and why."""
    return Table("Left out", "", ["arm", "reason"], [list(item) for item in results["left_out"].items()])


def percent(found: Mapping[str, Any] | None, form: str = ".1f", bare: bool = False) -> str:
    """A share as "12.3 [10.0, 14.6]" in %."""
    return _shown(found, form, 100, bare)


def number(found: Mapping[str, Any] | None, form: str = ".3f", bare: bool = False) -> str:
    """A number as "0.512 [0.480, 0.544]"."""
    return _shown(found, form, 1, bare)


AUC = (
    "AUC: chance that of a right and a wrong answer, same format and number of images, the right one has the higher "
    "attention ratio (0.5: it says nothing)"
)
KEYED = {"ratio/": ("Ratio", number), "auc/": (AUC, number)}  # what the numbers are; how they are written


def _shown(found: Mapping[str, Any] | None, form: str, scale: float, bare: bool) -> str:
    if found is None or found["mean"] is None:
        return ABSENT
    values = [found[name] for name in ("mean", "low", "high")]
    texts = ["" if value is None else format(round(scale * value, 9) + 0.0, form) for value in values]  # never -0.0
    return texts[0] if bare or found["low"] is None else "{} [{}, {}]".format(*texts)


def markdown(results: Mapping[str, Any]) -> str:
    """All tables in Markdown."""
    parts = [f"# Study\n\n{summary(results)}"]
    for table in tables(results):
        parts.append(f"## {table.title}\n\n" + (f"{table.note}\n\n" if table.note else "") + as_markdown(table))
    return "\n\n".join(parts) + "\n"


def as_markdown(table: Table) -> str:
    """Head and rows, without title and note."""
    return "\n".join([_line(table.head), _line(["---", *["---:"] * (len(table.head) - 1)]), *map(_line, table.rows)])


def summary(results: Mapping[str, Any]) -> str:
    """How much of the study is there, and of what it is made."""
    config, found, commits = results["config"], results["finished"], results["git_commits"]
    data = config["data"]
    text = (
        f"{found['finished']} of {found['units']} units finished. {config['steps']} steps of {config['batch']} pairs "
        f"for every arm, {data['num_pairs']} pairs about several images, {data['num_test']} test questions, "
        f"seeds {', '.join(map(str, config['seeds']))} (LoRA start and order of the pairs). "
        f"Code: {', '.join(map(short_commit, commits))}."
    )
    return text if len(commits) == 1 else f"{text} {SEVERAL}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
