"""The answers to a test set, as the page browses them: judged, filtered, and opened with their pictures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.llava_hound_dpo.evaluate import judged, read
from inference.llava_hound_dpo.summary import Row, looked_right
from llava.asked import image_names, placeholders, target_fields
from llava.image import ImageStore
from llava.records import Question, messages, read_questions
from scripts.draw_attention import asked_of

ANY = "any"
COLUMNS = {"question": 240, "answer": 180, "true answer": 180, "answered": 100, "looked": 90, "ratio": 80,
           "format": 110, "images": 80, "about": 90, "id": 220}  # px of each  # fmt: skip


def _about(row: Row) -> str:
    return image_names(t + 1 for t in row.asked.targets) if row.asked.image_type in ("sequence", "collage") else "-"


def _looked(row: Row) -> str:
    return {True: "right", False: "wrong", None: "unknown"}[looked_right(row)[0]]


def _answered(row: Row) -> str:
    return "right" if row.is_right else "wrong"


FILTERS: dict[str, Callable[[Row], str]] = {
    "format": lambda row: row.asked.image_type,
    "number of images": lambda row: str(row.asked.num_regions or "unknown"),
    "position": _about,
    "looked × answered": lambda row: f"looked {_looked(row)}, answered {_answered(row)}",
}


@dataclass(frozen=True)
class AnswerFiles:
    """A test set's questions by id, their pictures, and the judged rows of each answers file by its name."""

    questions: Mapping[str, Question]
    store: ImageStore
    files: Mapping[str, Sequence[Row]]

    @classmethod
    def read(cls, answers: Sequence[Path], data_path: str, image_folder: str) -> "AnswerFiles":
        """Raises DataError, ValueError, FileNotFoundError as `evaluate` does."""
        store = ImageStore(image_folder)
        rows = judged(*read(answers, Path(data_path)), "auto")
        questions = {question.id: question for question in read_questions(data_path)}
        return cls(questions, store, dict(zip(map(str, answers), rows, strict=True)))

    def choices(self, name: str) -> list[str]:
        """What the filter of a name can be set to."""
        found = {FILTERS[name](row) for rows in self.files.values() for row in rows}
        return [ANY, *sorted(found, key=lambda text: (len(text), text))]

    def table(self, file: str, *wanted: str) -> list[list[Any]]:
        """The rows (`COLUMNS`) of a file that are as `wanted`: a value of each of `FILTERS`, or ANY."""
        asked = list(zip(FILTERS.values(), wanted, strict=True))
        rows = [row for row in self.files[file] if all(value in (ANY, of(row)) for of, value in asked)]
        return [self._cells(row) for row in rows]

    def _cells(self, row: Row) -> list[Any]:
        ratio = row.given and row.given.attention_ratio
        return [
            asked_of(self.questions[row.asked.id]), row.given.text if row.given else "(no answer)", row.asked.answer,
            _answered(row), _looked(row), "-" if ratio is None else f"{ratio:.3f}", row.asked.image_type,
            row.asked.num_regions, _about(row), row.asked.id,
        ]  # fmt: skip

    def open(self, file: str, id: str) -> tuple[list, str, dict[str, Any], list[str]]:
        """A question to ask again: pictures, prompt, the fields that its record has, and what is known about it.

        Raises ValueError, FileNotFoundError for pictures that cannot be read.
        """
        question, row = self.questions[id], next(row for row in self.files[file] if row.asked.id == id)
        given = row.given.text if row.given else "(no answer)"
        said = [id, f"true answer: {row.asked.answer}", f"in {Path(file).name}: {given}",
                f"looked {_looked(row)}, answered {_answered(row)}"]  # fmt: skip
        pictures = [self.store.open(name) for name in question.images]
        words = question.prompt.removeprefix(placeholders(question.image_type, len(pictures)))  # `ask` puts it back
        return pictures, words, fields_of(question), said


def fields_of(question: Question) -> dict[str, Any]:
    """What a record says beside its prompt and pictures, as `VLM.ask` takes it."""
    found = {
        "image_type": question.image_type, **target_fields(question.targets), "is_search": question.is_search or None,
        "target_box": question.target_box and list(question.target_box), "grid": question.grid and list(question.grid),
        "context": messages(question.context) or None,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}
