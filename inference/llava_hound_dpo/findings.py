"""What the scores say, in sentences and tables: the same ones for the page, Markdown and LaTeX."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inference.llava_hound_dpo.llm_judge import RUBRICS, WITHOUT
from llava.markdown import interval, latex, number, table, tex
from llava.scorers import MISSING, RIGHT, UNPARSED, WRONG

FEW = 6  # scores that changed: five of one sign may be chance, by the exact test p is 0.06
CHANCE = (
    "1/images, where their number is known: the accuracy of a model that answers truly about an image drawn at random; "
    "dashed in the charts."
)
GROUPINGS = {  # by the name of their table: where files have the groups, and what these are
    "accuracy_format": ("by_format", "format"),
    "accuracy_images": ("by_num_images", "number of images or cells"),
    "accuracy_sequence": ("by_position.sequence", "position of the target, sequence"),
    "accuracy_collage": ("by_position.collage", "position of the target, collage"),
    "accuracy_category": ("by_category", "category"),
}
Scores = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table in texts; `groups` are what its chart shows, `name` what that is called in files."""

    name: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    groups: Mapping[str, Sequence[Scores]] | None = None


def preamble(scores: Scores) -> str:
    """What was scored how, and what was left out."""
    by = ", ".join(f"{count} by {name}" for name, count in next(iter(scores["answers"].values()))["scorers"].items())
    counted = "every question of the test set counts, answered or not"
    if not scores["questions"]:
        counted = "no --questions: a question that no file answers is not known, and not counted"
    text = (f"Scorer: {scores['scorer']} ({by}). Accuracy in % [95 % interval]; unparsed and missing answers score 0 "
            f"and stay in the denominator; {counted}.")  # fmt: skip
    if scores["comparisons"]:
        text += " Differences are in points, paired by question; each interval stands for itself."
    why = {"without_answer": "nobody says what is right", "tuned_on": "the settings of AdaptViz were chosen on them"}
    for ids, reason in ((scores[name], reason) for name, reason in why.items() if scores[name]):
        named = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "") + "; scores.json has all"
        text += f" Left out of all scores: {len(ids)} questions, because {reason} ({named})."
    return text


# ---- sentences


def sentences(scores: Scores) -> list[tuple[str, str]]:
    """Each with its kind: what got "better" and "worse" in each file than in the first, what is "open" or "missing".

    A difference is one where its interval leaves out 0 and at least FEW scores changed.
    """
    first = next(iter(scores["answers"]))
    against = [c for c in scores["comparisons"] if c["first"] == first]
    found = [sentence for c in against for sentence in _against_first(c)]
    alone = [("open", "One answers file: nothing to compare it with; --answers takes more.")]
    return (found or alone) + [sentence for own in scores["answers"].items() for sentence in _missing(*own)]


def _against_first(c: Scores) -> Iterator[tuple[str, str]]:
    sides: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
    for place, own in _places(c).items():
        few = f" ({own['changed']} scores changed)" if own["changed"] < FEW else ""
        sides[_side(own)].append(f"{place} {interval(own, 'difference', '+.1f')}{few}")
    for kind in ("better", "worse"):
        yield kind, f"{kind.title()} in {c['second']} than in {c['first']}: {', '.join(sides[kind]) or 'nothing'}."
    if sides["open"]:
        why = f"as the interval includes 0 or fewer than {FEW} scores changed"
        yield "open", f"Open between {c['second']} and {c['first']}, {why}: {', '.join(sides['open'])}."


def _places(c: Scores) -> dict[str, Scores]:
    return {"all": c} | (c["by_format"] if len(c["by_format"]) > 1 else {})


def _side(c: Scores) -> str:
    if c["changed"] < FEW or c["low"] <= 0 <= c["high"]:
        return "open"
    return "better" if c["difference"] > 0 else "worse"


def _missing(name: str, file: Scores) -> Iterator[tuple[str, str]]:
    counts = [f"{own[MISSING]} of {own['questions']} {t}" for t, own in file["by_format"].items() if own[MISSING]]
    if counts:
        yield "missing", f"{name} has no answer to {', '.join(counts)} questions, which count as wrong."


# ---- tables


def tables(scores: Scores) -> list[Table]:
    """All that have rows; accuracy by format is the first."""
    files = scores["answers"]
    by_format, *by_group = (_accuracy(files, name, *grouping) for name, grouping in GROUPINGS.items())
    of_files = (_flips(files), _attention(files), _confused(files))
    found = [by_format, _counts(files), _compared(scores), *by_group, *of_files]
    return [own for own in (*found, *_graded(scores)) if own.rows]


def _accuracy(files: Mapping[str, Scores], name: str, path: str, title: str) -> Table:
    every = [({"all": file["overall"]} if path == "by_format" else {}) | at(file, path) for file in files.values()]
    groups = {label: [own[label] for own in every] for label in every[0]}
    rows = [
        [label, str(own[0]["questions"]), *(interval(one, "accuracy") for one in own), number(own[0]["chance"])]
        for label, own in groups.items()
    ]
    head, title = ["", "questions", *files, "1/images"], f"Accuracy by {title}, % [95 % interval]"
    return Table(name, title, head, rows, CHANCE if path == "by_format" else "", groups)


def _by_file(files: Mapping[str, Scores], name: str, title: str, lines: Mapping[str, str], note: str) -> Table:
    """A row for each label: what the files have at its path, "a.b"."""
    rows = [[label, *(_shown(at(file, path)) for file in files.values())] for label, path in lines.items()]
    return Table(name, title, ["", *files], rows, note)


def at(found: Any, path: str) -> Any:
    """What stands at a path "a.b" of nested objects, None where there is nothing."""
    for key in path.split("."):
        found = (found or {}).get(key)
    return found


def _shown(found: Any) -> str:
    """A count, a share, a mean grade with its interval, or "-"."""
    if isinstance(found, dict):
        return interval(found, form=".2f", scale=1)
    return str(found) if isinstance(found, int) else number(found, ".3f", 1)


def _counts(files: Mapping[str, Scores]) -> Table:
    counted = (RIGHT, WRONG, UNPARSED, MISSING, "cut_off", "too_long")
    note = (
        "Cut off: answers that did not end before the limit of new tokens. Too long: prompt and answer have more "
        "tokens than the model was made for, as with too many pictures."
    )
    return _by_file(files, "answers", "Answers", {name.replace("_", " "): f"overall.{name}" for name in counted}, note)


def _compared(scores: Scores) -> Table:
    rows = [
        [f"{c['second']} - {c['first']}, {place}", str(own["questions"]), interval(own, "difference", "+.1f"),
         str(own["only_first_right"]), str(own["only_second_right"]), f"{own['mcnemar_p']:.2g}"]
        for c in scores["comparisons"] for place, own in _places(c).items()
    ]  # fmt: skip
    head = ["second - first", "questions", "difference", "only first right", "only second right", "McNemar p"]
    return Table("comparisons", "Accuracy, second - first, points [95 % interval], paired by question", head, rows)


def _flips(files: Mapping[str, Scores]) -> Table:
    names = dict.fromkeys(place for file in files.values() for place in at(file, "order.by_position") or ())
    is_there = any(at(file, "order") for file in files.values())
    lines = {"right in one and wrong in another": "order.flipped", "questions": "order.questions"}
    lines |= {"right in every order": "order.always_right", "right in none": "order.never_right"}
    lines |= {f"accuracy, target at {name}": f"order.by_position.{name}" for name in names}
    note = "Of questions answered in several orders of their pictures: shares [95 % interval], and counts."
    return _by_file(files, "order", "The same questions in other orders", lines if is_there else {}, note)


def _attention(files: Mapping[str, Scores]) -> Table:
    sides = ("right", "wrong")
    lines = {f"looked {a}, answered {b}": f"looked_answered.looked_{a}_answered_{b}" for a in sides for b in sides}
    lines |= {"where it looked is unknown": "looked_answered.judged_by.unknown"}
    lines |= {"attention ratio": "overall.attention_ratio"}
    names = dict.fromkeys(name for file in files.values() for name in file["ratio_auc"])
    lines |= {"ratio tells right from wrong, AUC" + f", {n}" * (n != "overall"): f"ratio_auc.{n}.auc" for n in names}
    note = (
        "Looked right: the target has the largest share of the image attention; where shares by image are absent, more "
        "than an even share of it. Attention ratio: share of the image attention that lies on the target, mean over "
        "the answers; a single image, which holds all of it, is left out. AUC: the chance that of a right and a wrong "
        "answer, same format and number of images, the right one has the higher attention ratio; 0.5 says nothing."
    )
    return _by_file(files, "attention", "Where it looked, and what it answered", lines, note)


def _confused(files: Mapping[str, Scores]) -> Table:
    lines = {"wrong": "confusion.wrong", "true of another image": "confusion.true_of_another",
             "their share": "confusion.of_wrong", "by chance": "confusion.chance"}  # fmt: skip
    note = (
        "A wrong answer that is true of another image of the prompt is a confusion. By chance: their share when the "
        'wrong answers are dealt to one another\'s questions. "-": no question says in `others` what is true of its '
        "other images."
    )
    return _by_file(files, "confusion", "Answers from another image", lines, note)


def _graded(scores: Scores) -> Iterator[Table]:
    if "judge" not in scores:
        return
    formats = dict.fromkeys(t for file in scores["answers"].values() for t in at(file, "judge.by_format") or ())
    lines = {name: f"judge.overall.{name}" for name in (*RUBRICS, "judged", *WITHOUT)}
    lines |= {f"{r}, {t}": f"judge.by_format.{t}.{r}" for t in formats for r in RUBRICS}
    note = "Means [95 % interval] over the answers that were graded."
    yield _by_file(scores["answers"], "judge", f"Grades 1 to 5 by {scores['judge']['model']}", lines, note)
    rows = [
        [f"{c['second']} - {c['first']}", str(c["judge"]["pairs"]),
         *(interval(c["judge"].get(rubric), "difference", "+.2f", 1) for rubric in RUBRICS)]
        for c in scores["comparisons"]
    ]  # fmt: skip
    yield Table("judge_comparisons", "Grades, second - first", ["second - first", "judged in both", *RUBRICS], rows)


# ---- as text


def markdown(scores: Scores) -> str:
    """scores.md: sentences, then every table."""
    changed = "".join(f"- {text}\n" for _, text in sentences(scores))
    return f"# Scores\n\n{preamble(scores)}\n\n{changed}\n{markdown_tables(scores)}"


def markdown_tables(scores: Scores) -> str:
    """Every table below its title."""
    made = [f"## {own.title}\n\n{table(own.head, own.rows)}\n\n{own.note}".strip() for own in tables(scores)]
    return "\n\n".join(made) + "\n"


def latex_tables(scores: Scores) -> str:
    """Every table as a float with its caption."""
    made = ["% Needs \\usepackage{booktabs}."]
    for own in tables(scores):
        caption, label = tex(f"{own.title}. {own.note}"), own.name.replace("_", "-")
        made.append(f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n\\label{{tab:{label}}}\n"
                    f"{latex(own.head, own.rows)}\n\\end{{table}}")  # fmt: skip
    return "\n\n".join(made) + "\n"
