"""Public multi-image data sets in, answers out to VLMEvalKit; lmms-eval runs our models itself (docs/harnesses.md).

python -m inference.llava_hound_dpo.interchange
  import --from blink --source FOLDER --split val --output DIR
    writes DIR/test.json and DIR/images from files on this machine; nothing is downloaded
  export --to vlmevalkit --answers answers.jsonl --questions DIR/test.json --output MODEL_BLINK.tsv
    writes a prediction table, MODEL_DATASET.tsv, for PRED_FORMAT=tsv and `--mode eval`; an empty prediction is read
    there as the text "nan". Source: open-compass/VLMEvalKit:vlmeval/smp/file.py, vlmeval/dataset/image_mcq.py
"""

import csv
import io
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from inference.llava_hound_dpo.interchange_formats import COLUMNS, picture_file, read_rows, read_tsv, record_of
from llava.command_line import command, flag, parse
from llava.records import Answer, DataError, Question, read_answers, read_questions, refuse_duplicates
from llava.runtime import setup_logging, user_errors, write_bytes, write_run_json, write_text

log = logging.getLogger(__name__)

INCOMPLETE = 1  # exit code: written, but without the records that could not be converted
SHOWN = 20  # problems in the log; run.json has all
PICTURES = ("image", "image_path")  # columns that a prediction table does not have
Given = list[tuple[Question, Answer]]


@dataclass(frozen=True)
class Import:
    """A data set becomes a test set."""

    _argument_group_name = "import"
    source_name: str = flag("which data set it is", aliases=["--from"], choices=list(COLUMNS))
    source: Path = flag("file, folder of files, or folder of save_to_disk")
    output: Path = flag("folder for test.json, images and run.json")
    split: str | None = flag("one of several: val, or Art_Style/val of a folder of subsets", None)
    image_folder: Path | None = flag("where the paths of pictures begin (default: beside --source)", None)
    strict: bool = flag("stop at the first record that cannot be converted", False)


@dataclass(frozen=True)
class Export:
    """Answers become VLMEvalKit's predictions."""

    _argument_group_name = "export"
    to: str = flag("which harness scores them", choices=["vlmevalkit"])
    answers: Path = flag("answers.jsonl of one model")
    questions: Path = flag("the imported test.json")
    output: Path = flag("file to write, .tsv")
    original: Path | None = flag("its TSV, for its columns and every one of its rows", None)


def main(argv: Sequence[str] | None = None) -> None:
    """Import or export, and say what was left out."""
    setup_logging()
    with user_errors():
        name, rest = command(argv, ("import", "export"), __doc__)
        (settings,) = parse((Import if name == "import" else Export,), __doc__, rest)
        if name == "export":
            log.info("%d answers in %s", export(settings), settings.output)
    if name == "import":
        import_command(settings)


# ---- import


def import_command(settings: Import) -> None:
    """Import a test set; exit code 1 where records could not be converted, 2 where none could."""
    file = settings.output / "test.json"
    with user_errors():
        if settings.output.exists() and not settings.output.is_dir():
            raise NotADirectoryError(f"--output {settings.output} is a file; give a folder")
        records, problems = import_set(settings)
        if not records:
            first = f"; the first: {problems[0]}" if problems else ""
            raise ValueError(f"{settings.source}: none of {len(problems)} records could be converted{first}")
        refuse_duplicates([(record["id"], f"record {n}") for n, record in enumerate(records, 1)])
        write_text(file, json.dumps(records, indent=1, ensure_ascii=False, default=str) + "\n")
        read_questions(file)  # what was written must be what the other stages read
    counts = {
        "read": len(records) + len(problems),
        "converted": len(records),
        "not converted": len(problems),
        "multiple choice": sum("choices" in record for record in records),
        **Counter(record["image_type"] for record in records),
    }
    write_run_json(settings.output / "run.json", arguments=asdict(settings), counts=counts, problems=problems)
    for line in problems[:SHOWN]:
        log.info("not converted: %s", line)
    log.info("%s in %s", json.dumps(counts), file)
    if problems:
        log.info("%d records are missing there; all reasons in %s", len(problems), settings.output / "run.json")
        sys.exit(INCOMPLETE)


def import_set(settings: Import) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of the test set, their pictures stored, and a line for each that could not be converted.

    Raises ValueError at the first of these with `strict`; FileNotFoundError, DataError, ValueError where the source
    cannot be read at all.
    """
    name, source, records, problems, ids = settings.source_name, settings.source, [], [], Counter()
    folder = settings.image_folder or (source if source.is_dir() else source.parent)
    for number, (file, place, row) in enumerate(read_rows(source, settings.split), 1):
        try:
            record, pictures = record_of(name, row)
            paths = store(pictures, folder, settings.output / "images", number)
        except ValueError as error:
            columns = COLUMNS[name].index.split("|") if isinstance(row, dict) else ()
            label = next((f" (id {row[column]})" for column in columns if column in row), "")
            problems.append(f"{file} record {place + 1}{label}: {error}")
            if settings.strict:
                raise ValueError(problems[0]) from error
            continue
        index = record["id"]
        ids[index] += 1
        records.append(record | {
            "id": index + (f"#{ids[index]}" if ids[index] > 1 else ""),
            "image": [paths[shown] for shown in record["image"]],
            "source": name,
            "source_index": index,
            "source_row": place,
            "source_fields": {key: row[key] for key in row if not re.fullmatch(COLUMNS[name].images, key)},
        })  # fmt: skip
    return records, problems


def store(pictures: Sequence[Any], folder: Path, output: Path, number: int) -> list[str]:
    """File names of the pictures of record `number` in `output`. Raises ValueError, before any of them is written."""
    files = []
    for n, value in enumerate(pictures, 1):
        try:
            content, extension = picture_file(value, folder)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"picture {n}: {error}") from error
        files.append((f"{number:06d}_{n}{extension}", content))
    for name, content in files:
        write_bytes(output / name, content)
    return [name for name, _ in files]


# ---- export


def export(settings: Export) -> int:
    """Write the answers as a table; returns how many.

    Raises DataError, ValueError, FileNotFoundError; also where a question of the test set has no answer, because the
    harness would leave it out of the denominator.
    """
    suffix = settings.output.suffix
    if suffix != ".tsv":
        raise ValueError(f"--output: {settings.to} reads .tsv of ours, not {suffix or 'a file without suffix'}")
    given = _matched(settings.answers, settings.questions)
    write_text(settings.output, _table(given, settings.original))
    return len(given)


def _matched(answers: Path, questions: Path) -> Given:
    """Every question with its answer, in the order of the test set."""
    asked = read_questions(questions)
    refuse_duplicates([(question.id, question.where) for question in asked])
    given = {answer.question_id: answer for answer in read_answers(answers)}
    problems = [f"{q.where}: no answer in {answers}" for q in asked if q.id not in given]
    known = {question.id for question in asked}
    problems += [f"{a.where}: the question {id} is not in {questions}" for id, a in given.items() if id not in known]
    cure = "no `source_index`; export is for test sets that `import` made"
    problems += [f"{question.where}: {cure}" for question in asked if "source_index" not in question.extra]
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more) from DataError(problems)
    return [(question, given[question.id]) for question in asked]


def _table(given: Given, original: Path | None) -> str:
    rows = _with_original(given, original) if original else [_table_row(*pair) for pair in given]
    columns = dict.fromkeys(name for row in rows for name in row if name not in (*PICTURES, "prediction"))
    text = io.StringIO()
    table = csv.DictWriter(
        text, [*columns, "prediction"], restval="", extrasaction="ignore", delimiter="\t", quoting=csv.QUOTE_ALL,
        lineterminator="\n",
    )  # fmt: skip
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _table_row(question: Question, answer: Answer) -> dict[str, Any]:
    """A row as VLMEvalKit has it: its own columns where the test set came from its table."""
    extra = question.extra
    if extra.get("source") == "vlmevalkit":
        return extra["source_fields"] | {"prediction": answer.text}
    options = {chr(ord("A") + n): text for n, text in enumerate(extra.get("choices", ()))}
    row = {"index": extra["source_index"], "question": question.prompt, **options, "answer": question.answer}
    return row | {"prediction": answer.text}


def _with_original(given: Given, original: Path) -> list[dict[str, Any]]:
    """Every row of the harness's own table. One that was never imported counts as answered with nothing."""
    texts = {str(question.extra["source_index"]): answer.text for question, answer in given}
    if not original.is_file():
        raise FileNotFoundError(f"--original {original}: no such file")
    rows = read_tsv(original)
    if any(not isinstance(row, dict) or "index" not in row for row in rows):
        raise ValueError(f"{original}: no table of VLMEvalKit: a row has no `index`, or more cells than the header")
    indices = {row["index"] for row in rows}
    unknown = [index for index in texts if index not in indices]
    if unknown:
        raise ValueError(f"{original}: no row has the index {unknown[0]} ({len(unknown)} answers have no row there)")
    missing = len(indices - set(texts))
    if missing:
        log.info("%d rows of %s were not imported: their prediction is empty, so that they count", missing, original)
    return [row | {"prediction": texts.get(row["index"], "")} for row in rows]


if __name__ == "__main__":
    main()
