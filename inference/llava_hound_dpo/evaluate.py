"""Scores of one or several answers files, with intervals and paired comparisons.

`python -m inference.llava_hound_dpo.evaluate --answers base.jsonl tuned.jsonl --questions test.json --output DIR`
"""

import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.llava_hound_dpo.judge_endpoint import KEY_VARIABLE, Endpoint
from inference.llava_hound_dpo.llm_judge import RUBRICS, WITHOUT, LlmJudge, add_grades
from inference.llava_hound_dpo.report import report
from inference.llava_hound_dpo.summary import Asked, Row, compare, groupings, judge, summarize
from llava.command_line import check_numbers, flag, parse
from llava.image import ImageStore
from llava.markdown import table
from llava.records import Answer, DataError, Question, read_answers, read_questions, refuse_duplicates, texts
from llava.runtime import setup_logging, user_errors, write_text
from llava.scorers import SCORERS

log = logging.getLogger(__name__)

COUNTS = ("right", "wrong", "unparsed", "missing", "cut_off")


@dataclass(frozen=True)
class Evaluation:
    """What is scored and where the scores go."""

    _argument_group_name = "evaluation"
    answers: list[Path] = flag("answers.jsonl, one file a model")
    output: Path = flag("folder for scores.json, scores.md, report.html")
    questions: Path | None = flag("the test set: what is not answered then counts as missing", None)
    scorer: str = flag(f"auto (choice where a question has choices, or exact), {', '.join(SCORERS)}", "auto")
    image_folder: Path | None = flag("pictures of --questions: report.html shows sample prompts", None)
    samples: int = flag("sample prompts in report.html at most", 12)

    def check(self) -> None:
        """Raises ValueError, NotADirectoryError for what cannot be meant."""
        check_numbers(self, samples=(0, None))
        if self.output.exists() and not self.output.is_dir():
            raise NotADirectoryError(f"--output {self.output} is a file; give a folder")
        if self.scorer.startswith(("lmms_eval", "vlmevalkit")):
            harness = self.scorer.split("_eval")[0].replace("lmms", "lmms_eval")
            raise ValueError(
                f"--scorer {self.scorer}: scores by the rules of other harnesses are theirs to give; write the answers "
                f"for them: python -m inference.llava_hound_dpo.interchange export --to {harness}"
            )
        if self.scorer not in ("auto", *SCORERS):
            raise ValueError(f"--scorer {self.scorer}: must be one of auto, {', '.join(SCORERS)}")


@dataclass(frozen=True)
class JudgeFlags:
    """The large language model that grades answers, if one does."""

    _argument_group_name = "LLM judge (asked with --judge_url only; --output keeps judgements.jsonl)"
    judge_url: str | None = flag("OpenAI-compatible endpoint, e.g. http://localhost:8000/v1", None)
    judge_model: str | None = flag("name that the endpoint has for the judge", None)
    judge_key_env: str = flag("environment variable that holds the key", KEY_VARIABLE)
    judge_workers: int = flag("requests at a time", 4)
    judge_pictures: Path | None = flag("folder, .zip or .tar: show the judge the pictures too", None)

    def judge(self, settings: Evaluation) -> LlmJudge | None:
        """The judge, None without --judge_url. Raises ValueError, FileNotFoundError."""
        if self.judge_url is None:
            if self.judge_model or self.judge_pictures:
                raise ValueError("--judge_model and --judge_pictures need an endpoint: give --judge_url too")
            return None
        if not self.judge_model:
            raise ValueError("--judge_url needs --judge_model: the name that the endpoint has for its model")
        check_numbers(self, judge_workers=(1, None))
        if self.judge_pictures and not settings.questions:
            raise ValueError(
                "--judge_pictures needs --questions: only the test set says which pictures are asked about"
            )
        store = ImageStore(self.judge_pictures) if self.judge_pictures else None
        endpoint = Endpoint(self.judge_url, self.judge_model, self.judge_key_env)
        return LlmJudge(endpoint, self.judge_workers, settings.output / "judgements.jsonl", settings.questions, store)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads, scores, writes scores.json, scores.md and report.html, and logs the table."""
    setup_logging()
    with user_errors():
        settings, judge_flags = parse((Evaluation, JudgeFlags), __doc__, argv)
        settings.check()
        store = ImageStore(settings.image_folder) if settings.image_folder else None
        llm = judge_flags.judge(settings)
        try:
            rows = judged_by_name(settings.answers, settings.questions, settings.scorer)
            scores = scores_of(settings.answers, rows, settings.questions, settings.scorer, llm)
            questions = read_questions(settings.questions) if settings.questions and store else ()
        except DataError as error:
            more = len(error.problems) - 1
            raise ValueError(error.problems[0] + (f" (and {more} more problems)" if more else "")) from error
        text = markdown(scores)
        write_text(settings.output / "scores.json", json.dumps(scores, indent=2, ensure_ascii=False) + "\n")
        write_text(settings.output / "scores.md", text)
        write_text(settings.output / "report.html", report(scores, rows, questions, store, settings.samples))
    log.info(text)


def evaluate(
    paths: Sequence[Path], questions: Path | None = None, scorer: str = "auto", llm: LlmJudge | None = None
) -> dict[str, Any]:
    """All scores of the files, as scores.json holds them. Raises DataError, ValueError, FileNotFoundError."""
    return scores_of(paths, judged_by_name(paths, questions, scorer), questions, scorer, llm)


def judged_by_name(paths: Sequence[Path], questions: Path | None, scorer: str) -> dict[str, list[Row]]:
    """`judged`, by the names that the table has for the files."""
    return dict(zip(_names(paths), judged(paths, questions, scorer), strict=True))


def scores_of(
    paths: Sequence[Path], by_name: dict[str, list[Row]], questions: Path | None, scorer: str, llm: LlmJudge | None
) -> dict[str, Any]:
    """`evaluate` of rows that are judged already."""
    names = list(by_name)
    scores = {
        "scorer": scorer,
        "questions": str(questions) if questions else None,
        "answers": {
            name: {"file": str(path), **summarize(by_name[name])} for name, path in zip(names, paths, strict=True)
        },
        "comparisons": [
            {"first": first, "second": second, **compare(by_name[first], by_name[second])}
            for first, second in itertools.combinations(names, 2)
        ],
    }
    if llm:
        add_grades(scores, by_name, llm)
    return scores


def judged(paths: Sequence[Path], questions: Path | None, scorer: str) -> list[list[Row]]:
    """For each file a row for every question, in one order: of the test set, else of first appearance in the files."""
    files = [read_answers(path) for path in paths]
    asked = _asked_of_test_set(questions) if questions else {}
    problems = []
    for answer in itertools.chain.from_iterable(files):
        if questions and answer.question_id not in asked:
            problems.append(f"{answer.where}: the question {answer.question_id} is not in {questions}")
            continue
        known = asked.setdefault(answer.question_id, _asked_of_answer(answer))
        problems += [f"{answer.where}: {difference}" for difference in _differences(answer, known)]
    if problems:
        raise DataError(problems)
    given = [{answer.question_id: answer for answer in answers} for answers in files]
    return [[judge(question, found.get(question.id), scorer) for question in asked.values()] for found in given]


def _differences(answer: Answer, known: Asked) -> list[str]:
    """Where an answer was given to another version of the question."""
    pairs = [("answer", answer.answer, known.answer), ("image_type", answer.image_type, known.image_type)]
    pairs.append(("target", _counted_from_1(answer.target), _counted_from_1(known.target)))
    return [f"`{name}` is {here!r}, but {known.where} has {there!r}" for name, here, there in pairs if here != there]


def _counted_from_1(target: int | None) -> int | None:
    return None if target is None else target + 1


def _asked_of_test_set(path: Path) -> dict[str, Asked]:
    found = read_questions(path)
    refuse_duplicates([(question.id, question.where) for question in found])
    return {question.id: _asked_of_question(question) for question in found}


def _asked_of_question(question: Question) -> Asked:
    try:
        choices, others = texts(question.extra, "choices") or (), texts(question.extra, "others")
    except ValueError as error:
        raise DataError([f"{question.where}: {error}"]) from error
    cells = question.grid[0] * question.grid[1] if question.grid else 1
    regions = _num_regions(question.image_type, max(cells, len(question.images)))
    return Asked(
        question.id, question.where, question.answer, question.image_type, question.target, regions, choices, others
    )


def _asked_of_answer(answer: Answer) -> Asked:
    regions = _num_regions(answer.image_type, max(answer.num_images, len(answer.attention_by_image or ())))
    return Asked(
        answer.question_id, answer.where, answer.answer, answer.image_type, answer.target, regions, answer.choices,
        answer.others,
    )  # fmt: skip


def _num_regions(image_type: str, counted: int) -> int | None:
    """Images or cells a prompt tells apart; None for a collage whose record has no grid (it counts as one image)."""
    if image_type == "collage" and counted == 1:
        return None
    return {"pip": 2, "single": 1}.get(image_type, counted)


def _names(paths: Sequence[Path]) -> list[str]:
    """What the table calls the files: their stems, or whole paths where stems repeat."""
    stems = [path.stem.removeprefix("answers_") for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError("--answers names a file twice")
    return names


# ---- the table


def markdown(scores: dict[str, Any]) -> str:
    """The scores as Markdown: accuracy by group, counts, and comparisons."""
    files = scores["answers"]
    parts = ["# Scores", "\n".join(_notes(scores)), _accuracy_table(files), _counts_table(files)]
    if scores["comparisons"]:
        parts.append(_comparison_table(scores["comparisons"]))
    if "judge" in scores:
        parts += _judge_tables(scores)
    return "\n\n".join(parts) + "\n"


def _notes(scores: dict[str, Any]) -> list[str]:
    missing = "every question of the test set is in the denominator, answered or not"
    if scores["questions"] is None:
        missing = "no --questions: a question that no file answers is not known, and not counted"
    return [
        f"Scorer: {scores['scorer']}. Accuracy in % [95 % interval]; unparsed and missing answers score 0; {missing}.",
        "Looked right: the target has the largest share of the image attention; where shares by image are absent, more "
        "than an even share of it. Chance of confusion: the wrong answers, dealt to one another's questions.",
        "Ratio tells right from wrong: the chance that of a right and a wrong answer, same format and number of "
        "images, the right one has the higher attention ratio; 0.5 says nothing.",
    ]


def _accuracy_table(files: dict[str, dict]) -> str:
    rows = [("**overall**", [file["overall"] for file in files.values()])]
    for grouping in groupings(files):
        rows += [(grouping.label.format(name), groups) for name, groups in grouping.groups.items()]
    return table(
        ["", "questions", *files],
        [
            [label, str(groups[0]["questions"]), *(_interval(group, "accuracy", ".1f", 100) for group in groups)]
            for label, groups in rows
        ],
    )


def _counts_table(files: dict[str, dict]) -> str:
    every, first = list(files.values()), next(iter(files.values()))
    rows = {name.replace("_", " "): [str(f["overall"][name]) for f in every] for name in COUNTS}
    rows["attention ratio"] = [_number(f["overall"]["attention_ratio"]) for f in every]
    for name, label in (("of_wrong", "wrong answers true of another image"), ("chance", "the same by chance")):
        shares = [(f["confusion"] or {}).get(name) for f in every]
        rows[label] = ["-" if share is None else f"{100 * share:.1f} %" for share in shares]
    for name in list(first["looked_answered"])[:4]:
        label = name.replace("_answered", ", answered").replace("_", " ")
        rows[label] = [str(f["looked_answered"][name]) for f in every]
    rows["where it looked is unknown"] = [str(f["looked_answered"]["judged_by"]["unknown"]) for f in every]
    for name in first["ratio_auc"]:
        label = "ratio tells right from wrong, AUC" + ("" if name == "overall" else f", {name}")
        rows[label] = [_number(f["ratio_auc"].get(name, {}).get("auc")) for f in every]
    return table(["", *files], [[label, *cells] for label, cells in rows.items()])


def _comparison_table(comparisons: Sequence[dict]) -> str:
    head = ["second - first", "difference", "only first right", "only second right", "McNemar p"]
    return table(head, [
        [f"{c['second']} - {c['first']}", _interval(c, "difference", "+.1f", 100), str(c["only_first_right"]),
         str(c["only_second_right"]), f"{c['mcnemar_p']:.2g}"]
        for c in comparisons
    ])  # fmt: skip


def _judge_tables(scores: dict[str, Any]) -> list[str]:
    files = [file["judge"] for file in scores["answers"].values()]
    groups = [("**{}**", [file["overall"] for file in files])]
    groups += [(f"{{}}, {name}", [file["by_format"][name] for file in files]) for name in files[0]["by_format"]]
    rows = [
        [label.format(rubric), *(_interval(own[rubric], "mean", ".2f") for own in group)]
        for label, group in groups
        for rubric in RUBRICS
    ]
    rows += [[count, *(str(file["overall"][count]) for file in files)] for count in ("judged", *WITHOUT)]
    compared = [
        [f"{c['second']} - {c['first']}", str(c["judge"]["pairs"]),
         *(_interval(c["judge"][rubric], "difference", "+.2f") for rubric in RUBRICS)]
        for c in scores["comparisons"]
    ]  # fmt: skip
    found = [table([f"grades 1 to 5 by {scores['judge']['model']}", *scores["answers"]], rows)]
    return found + ([table(["grades, second - first", "judged in both", *RUBRICS], compared)] if compared else [])


def _interval(found: dict[str, float] | None, name: str, form: str, factor: float = 1) -> str:
    """A number with its 95 % interval, "-" where there is none."""
    value, low, high = (format(factor * found[key], form) for key in (name, "low", "high")) if found else ("",) * 3
    return f"{value} [{low}, {high}]" if found else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
