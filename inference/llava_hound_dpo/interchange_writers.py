"""Answers in the files that public harnesses score.

VLMEvalKit: a prediction table, `MODEL_DATASET.tsv` (set PRED_FORMAT=tsv and run with `--mode eval`). Its multiple
choice sorts the table as a data frame, which a `.json` is not: that form is for `--reuse`. It reads an empty
prediction as the text "nan". Source: open-compass/VLMEvalKit:vlmeval/smp/file.py, vlmeval/dataset/image_mcq.py.

lmms-eval: a sample log, `DATE_samples_TASK.jsonl`, as its comparisons of models read it; or a `.json` log, whose
answers `--model from_log --model_args logs=FOLDER` scores. Source: EvolvingLMMs-Lab/lmms-eval:
lmms_eval/loggers/evaluation_tracker.py, lmms_eval/baselines/loader.py, lmms_eval/models/simple/from_log.py.
"""

import csv
import io
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inference.llava_hound_dpo.interchange_readers import read_tsv
from llava.records import Answer, DataError, Question, read_answers, read_questions, refuse_duplicates
from llava.runtime import write_text

log = logging.getLogger(__name__)

PICTURES = ("image", "image_path")  # columns that a prediction table does not have
Given = list[tuple[Question, Answer]]


def export(
    to: str, answers: Path, questions: Path, output: Path, original: Path | None = None, task: str | None = None
) -> int:
    """Write the answers for the harness `to`, a name in WRITERS; returns how many.

    Raises DataError, ValueError, FileNotFoundError; also where a question of the test set has no answer, because the
    harnesses would leave it out of the denominator.
    """
    given = _matched(answers, questions)
    write_text(output, WRITERS[to](given, output.suffix, original, task))
    return len(given)


def _matched(answers: Path, questions: Path) -> Given:
    """Every question with its answer, in the order of the test set."""
    asked = read_questions(questions)
    refuse_duplicates([(question.id, question.where) for question in asked])
    given = {answer.question_id: answer for answer in read_answers(answers)}
    problems = [f"{q.where}: no answer in {answers}" for q in asked if q.id not in given]
    known = {question.id for question in asked}
    problems += [f"{a.where}: the question {id} is not in {questions}" for id, a in given.items() if id not in known]
    problems += [
        f"{q.where}: no `source_index`; export is for test sets that `import` made"
        for q in asked
        if "source_index" not in q.extra
    ]
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more) from DataError(problems)
    return [(question, given[question.id]) for question in asked]


# ---- VLMEvalKit


def _vlmevalkit(given: Given, suffix: str, original: Path | None, task: str | None) -> str:
    rows = _with_original(given, original) if original else [_table_row(*pair) for pair in given]
    if suffix == ".json":
        rows = [row | {"index": int(row["index"]) if row["index"].isdecimal() else row["index"]} for row in rows]
        return json.dumps(rows, indent=4, ensure_ascii=False) + "\n"
    if suffix != ".tsv":
        raise ValueError(f"--output: VLMEvalKit reads .tsv and .json of ours, not {suffix or 'a file without suffix'}")
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "prediction"))
    text = io.StringIO()
    table = csv.DictWriter(
        text, [*columns, "prediction"], restval="", delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n"
    )
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _table_row(question: Question, answer: Answer) -> dict[str, Any]:
    """A row as VLMEvalKit has it: its own columns where the test set came from its table."""
    extra = question.extra
    if extra.get("source") == "vlmevalkit":
        row = _without_pictures(extra["source_fields"])
    else:
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
    return [_without_pictures(row) | {"prediction": texts.get(row["index"], "")} for row in rows]


def _without_pictures(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in PICTURES}


# ---- lmms-eval


def _lmms_eval(given: Given, suffix: str, original: Path | None, task: str | None) -> str:
    if original:
        raise ValueError("--original is for VLMEvalKit: lmms-eval's log needs none")
    if len({_doc_id(question) for question, _ in given}) < len(given):
        raise ValueError(
            "--questions holds several subsets, each a task of lmms-eval: import and export them one by one"
        )
    if suffix == ".jsonl":
        return "".join(json.dumps(_sample(*pair), ensure_ascii=False) + "\n" for pair in given)
    if suffix != ".json":
        raise ValueError(f"--output: lmms-eval reads .jsonl and .json, not {suffix or 'a file without suffix'}")
    if not task:
        raise ValueError("--task is missing: a .json log says which lmms-eval task it answers (blink_art_style)")
    logs = [
        {"doc_id": _doc_id(question), "target": _target(question), "resps": [[answer.text]]}
        for question, answer in given
    ]
    args = {"model": "attention-aware-dpo", "model_args": "", "limit": None}
    return json.dumps({"args": args, "model_configs": {"task": task}, "logs": logs}, ensure_ascii=False) + "\n"


def _sample(question: Question, answer: Answer) -> dict[str, Any]:
    return {
        "doc_id": _doc_id(question),
        "doc": question.extra.get("source_fields", {}),
        "target": _target(question),
        "input": question.prompt,
        "resps": [answer.text],
        "filtered_resps": answer.text,
    }


def _doc_id(question: Question) -> int:
    """Place of the row in its split, from 0."""
    return question.extra["source_row"]


def _target(question: Question) -> str:
    """The true answer as the data set writes it ("(A)")."""
    fields = question.extra.get("source_fields", {})
    found: Sequence = [fields[name] for name in ("answer", "answers", "correct_choice", "label") if name in fields]
    return str(found[0]) if found else question.answer


WRITERS: dict[str, Callable[[Given, str, Path | None, str | None], str]] = {
    "vlmevalkit": _vlmevalkit,
    "lmms_eval": _lmms_eval,
}
