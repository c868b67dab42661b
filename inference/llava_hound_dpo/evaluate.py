"""Scores of one or several answers files, with intervals and paired comparisons.

`python -m inference.llava_hound_dpo.evaluate --answers base.jsonl tuned.jsonl --questions test.json --output DIR`
"""

import errno
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inference.llava_hound_dpo.findings import GROUPINGS, latex_tables, markdown, markdown_tables
from inference.llava_hound_dpo.llm_judge import LlmJudge, add_grades
from inference.llava_hound_dpo.report import draw_charts, report
from inference.llava_hound_dpo.summary import Asked, Row, compare, flips, judge, summarize
from llava.asked import target_fields
from llava.charts import KINDS
from llava.command_line import check_numbers, flag, parse
from llava.endpoint import KEY_VARIABLE, Endpoint
from llava.image import ImageStore
from llava.order import permutation_of, permuted, why_fixed
from llava.records import Answer, DataError, Question, read_answers, read_questions, refuse_duplicates, texts
from llava.run_folder import only_writer
from llava.runtime import check_outputs, setup_logging, user_errors, write_bytes, write_text
from llava.scorers import SCORERS

log = logging.getLogger(__name__)

WRITTEN = ("scores.json", "scores.md", "report.html")
TABLES = {".tex": latex_tables, ".md": markdown_tables}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Evaluation:
    """What is scored and where the scores go."""

    _argument_group_name = "evaluation"
    answers: list[Path] = flag("answers.jsonl, one file a model")
    output: Path = flag("folder for scores.json, scores.md, report.html and its figures")
    questions: Path | None = flag("the test set: what is not answered then counts as missing", None)
    scorer: str = flag(f"auto (choice where a question has choices, or exact), {', '.join(SCORERS)}", "auto")
    image_folder: Path | None = flag("pictures of --questions: report.html shows sample prompts", None)
    samples: int = flag("sample prompts in report.html at most", 12)
    table: Path | None = flag("the tables alone too, for a paper: FILE.tex (by booktabs) or FILE.md", None)

    def check(self) -> None:
        """Raises ValueError, NotADirectoryError for what cannot be meant."""
        check_numbers(self, samples=(0, None))
        if self.output.exists() and not self.output.is_dir():
            raise NotADirectoryError(f"--output {self.output} is a file; give a folder")
        written = [self.output / name for name in WRITTEN]
        check_outputs(written + [self.table] * bool(self.table), [*self.answers, self.questions])
        if self.table and (self.table.suffix not in TABLES or self.table.resolve() in map(Path.resolve, written)):
            raise ValueError(f"--table {self.table}: a file of its own, whose name ends in .tex or .md")
        if self.scorer.startswith(("lmms_eval", "vlmevalkit")):
            way = "write the answers for it: python -m inference.llava_hound_dpo.interchange export --to vlmevalkit"
            if self.scorer.startswith("lmms_eval"):
                way = "it runs our models itself: lmms-eval --model attention_aware (docs/harnesses.md)"
            raise ValueError(
                f"--scorer {self.scorer}: scores by the rules of another harness are for it to give; {way}"
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
        check_numbers(self, judge_workers=(1, 1000))
        if self.judge_pictures and not settings.questions:
            raise ValueError(
                "--judge_pictures needs --questions: only the test set says which pictures are asked about"
            )
        store = ImageStore(self.judge_pictures) if self.judge_pictures else None
        endpoint = Endpoint(self.judge_url, self.judge_model, self.judge_key_env)
        return LlmJudge(endpoint, self.judge_workers, settings.output / "judgements.jsonl", settings.questions, store)


def main(argv: Sequence[str] | None = None) -> None:
    """Reads, scores, writes scores.json, scores.md, report.html and figures, and logs the table."""
    setup_logging()
    with ExitStack() as stack, user_errors():
        settings, judge_flags = parse((Evaluation, JudgeFlags), __doc__, argv)
        settings.check()
        llm = judge_flags.judge(settings)
        stack.enter_context(only_writer(settings.output.absolute()))  # beside it: bad input makes no folder
        try:
            text = write(settings, llm)
        except DataError as error:
            more = len(error.problems) - 1
            raise ValueError(error.problems[0] + (f" (and {more} more problems)" if more else "")) from error
        except OSError as error:
            if error.errno in DISK_FULL:
                raise ValueError(f"{settings.output}: {error.strerror}; make room and start again") from error
            raise
    log.info(text)


def write(settings: Evaluation, llm: LlmJudge | None) -> str:
    """Score, and write all files once all are made; gives scores.md. Raises as `evaluate`, and OSError."""
    store = ImageStore(settings.image_folder) if settings.image_folder else None
    scores, rows = evaluate(settings.answers, settings.questions, settings.scorer, llm)
    questions = read_questions(settings.questions) if settings.questions and store else ()
    text, charts = markdown(scores), draw_charts(scores)
    page = report(scores, rows, questions, store, settings.samples, charts)
    made = json.dumps(scores, indent=2, ensure_ascii=False) + "\n", text, page
    for name, content in zip(WRITTEN, made, strict=True):
        write_text(settings.output / name, content)
    if settings.table:
        write_text(settings.table, TABLES[settings.table.suffix](scores))
    for name, kind in itertools.product(GROUPINGS, KINDS):
        path = settings.output / f"figures/{name}.{kind}"
        if (name, kind) in charts:
            write_bytes(path, charts[name, kind])
        else:
            path.unlink(missing_ok=True)  # of earlier answers
    return text


def evaluate(
    paths: Sequence[Path], questions: Path | None = None, scorer: str = "auto", llm: LlmJudge | None = None
) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """All scores of the files, as scores.json holds them, and their judged rows by the files' names there.

    Raises DataError, ValueError, FileNotFoundError.
    """
    given, asked = read(paths, questions)
    every = dict(zip(_names(paths), judged(given, asked, scorer), strict=True))
    by_name = {name: [row for row in rows if not row.asked.permutation] for name, rows in every.items()}
    files = dict(zip(by_name, paths, strict=True))
    scores = {
        "scorer": scorer,
        "questions": str(questions) if questions else None,
        "without_answer": [question.id for question in asked if not (question.answer or question.permutation)],
        "tuned_on": [question.id for question in asked if not question.permutation and is_tuned_on(question.id, given)],
        "answers": {
            name: {"file": str(files[name]), **summarize(rows), "order": flips(every[name])}
            for name, rows in by_name.items()
        },
        "comparisons": [
            {"first": first, "second": second, **compare(by_name[first], by_name[second])}
            for first, second in itertools.combinations(by_name, 2)
        ],
    }
    if llm:
        add_grades(scores, by_name, llm)
    return scores, by_name


Given = list[dict[str, Answer]]  # of each file, by the question's id


def read(paths: Sequence[Path], questions: Path | None) -> tuple[Given, list[Asked]]:
    """The answers of each file, and what was asked, in the order of the test set, else of appearance in the files.

    Raises DataError, FileNotFoundError; ValueError where no question has a right answer.
    """
    files = [read_answers(path) for path in paths]
    found = read_questions(questions) if questions else []
    refuse_duplicates([(question.id, question.where) for question in found])
    by_id = {question.id: question for question in found}
    asked = {question.id: _asked_of_question(question) for question in found}
    problems = []
    for answer in itertools.chain.from_iterable(files):
        try:
            own = _asked_of_answer(answer)
            known = asked[own.id] = asked.get(own.id) or _known(own, by_id, questions)
        except ValueError as error:
            problems.append(f"{answer.where}: {error}")
            continue
        problems += [f"{answer.where}: {difference}" for difference in _differences(own, known)]
        if known.num_regions is None:  # a collage without its grid, which was read off the picture
            asked[answer.question_id] = replace(known, num_regions=own.num_regions)
    if problems:
        raise DataError(problems)
    if not any(question.answer for question in asked.values()):
        raise ValueError(f"{questions or paths[0]}: no question has a right answer (`answer`): nothing can be scored")
    return [{answer.question_id: answer for answer in answers} for answers in files], list(asked.values())


def is_tuned_on(id: str, given: Given) -> bool:
    """Whether any file's AdaptViz was chosen on the question: then no file is scored on it."""
    return any(id in own and own[id].extra.get("is_tuned_on") is True for own in given)


def judged(given: Given, asked: Sequence[Asked], scorer: str) -> list[list[Row]]:
    """For each file a row for every question that has a right answer, in one order; those in other orders too.

    Raises ValueError without any.
    """
    scored = [question for question in asked if question.answer and not is_tuned_on(question.base, given)]
    if not scored:
        raise ValueError("AdaptViz was tuned on every question that has a right answer: score it on others")
    return [[judge(question, found.get(question.id), scorer) for question in scored] for found in given]


def _known(own: Asked, by_id: Mapping[str, Question], questions: Path | None) -> Asked:
    """What was asked, by the answer itself, or by the test set in another order. Raises ValueError."""
    if not questions and not own.permutation:
        return own
    if own.base not in by_id:
        raise ValueError(f"the question {own.base} is not in {questions or '--questions, which other orders need'}")
    question, order = by_id[own.base], own.permutation[1]
    if len(order) != len(question.images) or why_fixed(question):
        raise ValueError(f"`permutation`: {question.where} cannot have its pictures in this order")
    return replace(_asked_of_question(permuted(question, order)), id=own.id, permutation=own.permutation)


def _differences(own: Asked, known: Asked) -> list[str]:
    """Where an answer was given to another version of the question."""
    pairs = [(name, getattr(own, name), getattr(known, name)) for name in ("answer", "image_type", "permutation")]
    fields = [target_fields(record.targets) for record in (own, known)]  # from 1, as in files
    pairs.append(("target", *(said.get("targets", said["target"]) for said in fields)))
    return [f"`{name}` is {here!r}, but {known.where} has {there!r}" for name, here, there in pairs if here != there]


def _asked_of_question(question: Question) -> Asked:
    try:
        choices, others = texts(question.extra, "choices") or (), texts(question.extra, "others")
    except ValueError as error:
        raise DataError([f"{question.where}: {error}"]) from error
    cells = question.grid[0] * question.grid[1] if question.grid else 1
    return _asked(question, question.id, max(cells, len(question.images)), choices, others)


def _asked_of_answer(answer: Answer) -> Asked:
    counted = max(answer.num_images, len(answer.attention_by_image or ()))
    own = _asked(answer, answer.question_id, counted, answer.choices, answer.others)
    return replace(own, permutation=permutation_of(answer.extra, answer.num_images * (answer.image_type == "sequence")))


def _asked(record: Question | Answer, id: str, counted: int, *options: tuple[str, ...] | None) -> Asked:
    """`counted`: images or cells of the record; a collage without its grid counts as one image."""
    image_type = record.image_type
    is_unknown = image_type == "collage" and counted == 1
    regions = None if is_unknown else {"pip": 2, "single": 1}.get(image_type, counted)
    category = record.extra.get("category", record.extra.get("subtask", record.extra.get("sub_task")))
    category = category if isinstance(category, str) and category.strip() else None
    return Asked(id, record.where, record.answer, image_type, record.targets, regions, *options, category)


def _names(paths: Sequence[Path]) -> list[str]:
    """What the table calls the files: their stems, or whole paths where stems repeat."""
    stems = [path.stem.removeprefix("answers_") for path in paths]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError("--answers names a file twice")
    return names


if __name__ == "__main__":
    main()
