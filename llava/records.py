"""The files that pass between stages: how they are read, and what is refused.

A record's `target` is 1-based in files and prompts ("Image1") and 0-based inside; it is converted here, once.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

FORMATS = ("sequence", "collage", "pip", "single", "multi")
TARGET = re.compile(r"In Image(\d+)")
IMAGE = "<image>"  # stands in a prompt for each picture
RESERVED = (IMAGE, "</s>")  # of no answer, whatever the model
PLACEHOLDER_OF_MIA_DPO = "<image-placeholder>"
KNOWN = {"id", "image", "prompt", "image_type", "target", "target_box", "grid"}


class DataError(ValueError):
    """Bad input: `problems` has one line each, naming file, record and id; the message is the first of them."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        others = len(problems) - 1
        more = f" ({others} more records have problems; python -m scripts.doctor lists all)" if others else ""
        super().__init__(problems[0] + more)


@dataclass(frozen=True)
class Prompt:
    """A question about one or several images, and which of them it refers to."""

    where: str  # "train.json record 3 (id coco_41)", for messages
    id: str
    images: tuple[str, ...]  # paths below the image folder or archive
    prompt: str  # one `<image>` per image
    image_type: str  # one of FORMATS
    target: int | None  # 0-based image of a sequence or cell of a collage; None for multi; 0 otherwise
    target_box: tuple[float, float, float, float] | None  # x0, y0, x1, y1 in px of the stored image
    grid: tuple[int, int] | None  # rows, cols of a collage
    extra: dict[str, Any] = field(default_factory=dict, repr=False)  # unknown fields, passed on


@dataclass(frozen=True)
class Preference(Prompt):
    """A prompt with a better (`chosen`) and a worse (`rejected`) answer."""

    chosen: str = ""
    rejected: str = ""


@dataclass(frozen=True)
class Question(Prompt):
    """A prompt of a test set, or of an instruction, with its true answer."""

    answer: str = ""  # "" where a test set does not say what is right: answered, but not scored


@dataclass(frozen=True)
class Answer:
    """What a model answered to a question, with what the question was (a line of answers.jsonl)."""

    where: str
    question_id: str
    text: str  # may be empty
    answer: str  # the true one; "" where nobody says what is right
    image_type: str
    target: int | None  # 0-based image of a sequence or cell of a collage; None for multi; 0 otherwise
    num_images: int  # images of a sequence or multi, cells of a collage where its grid is known
    choices: tuple[str, ...] = ()
    others: tuple[str, ...] | None = None  # what is true of the other images
    attention_ratio: float | None = None
    attention_by_image: tuple[float, ...] | None = None  # share of the image attention on each image or cell
    extra: dict[str, Any] = field(default_factory=dict, repr=False)  # all other fields: prompt, confidence, scale, ...


def read_preferences(path: str | Path) -> list[Preference]:
    """Preference pairs of a JSON array or JSONL file. Raises DataError, FileNotFoundError."""
    return read_records(path, parse_preference)


def read_questions(path: str | Path) -> list[Question]:
    """Questions of a test set, JSON array or JSONL. Raises DataError, FileNotFoundError."""
    return read_records(path, parse_question)


def read_prompts(path: str | Path) -> list[Question]:
    """Questions of a test set, or of preference pairs, whose chosen answer is the true one.

    Raises DataError, FileNotFoundError.
    """
    return read_records(path, _parse_prompt_of_any)


def read_instructions(path: str | Path) -> list[Question]:
    """First question of every instruction, with its true answer; a refusal comes without a target.

    Records of a test set (`prompt`, `answer`) are taken as well. Raises DataError, FileNotFoundError.
    """
    return read_records(path, _parse_instruction)


def read_answers(path: str | Path) -> list[Answer]:
    """Answers of one model to a test set. Raises DataError (also where an id is answered twice), FileNotFoundError."""
    answers = read_records(path, _parse_answer)
    refuse_duplicates([(answer.question_id, answer.where) for answer in answers])
    return answers


def refuse_duplicates(found: list[tuple[str, str]]) -> None:
    """Raise DataError where an id of (id, where) pairs occurs twice, one line for each second occurrence."""
    first: dict[str, str] = {}
    twice = [
        f"{where}: {id} was there before, in {first[id]}" for id, where in found if first.setdefault(id, where) != where
    ]
    if twice:
        raise DataError(twice)


def read_json(path: str | Path) -> list[Any]:
    """Items of a JSON array, or of a JSONL file, told apart by content; a BOM is ignored.

    Raises FileNotFoundError, or DataError with line and column where the file is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError([f"{path}: not UTF-8 text (byte {error.start}); is it an archive or a picture?"]) from error
    if not text.strip():
        raise DataError([f"{path}: the file is empty"])
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                [f"{path}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}"]
            ) from error
    return list(_json_lines(path, text))


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut inside strings, at U+2028
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError([f"{path}: broken JSON at line {number}, column {error.colno}: {error.msg}"]) from error


def name_of(path: str | Path, number: int, raw: Any) -> str:
    """How messages name a record: file, number from 1, id if it has one."""
    key = next((key for key in ("id", "question_id") if isinstance(raw, dict) and key in raw), None)
    return f"{path} record {number}" + (f" (id {raw[key]})" if key else "")


def read_records(path: str | Path, parse: Callable[[Any, str], Any]) -> list:
    """What `parse` makes of every record and its name. Raises DataError with a line for each that it refuses."""
    records, problems = [], []
    for number, raw in enumerate(read_json(path), 1):
        where = name_of(path, number, raw)
        try:
            records.append(parse(raw, where))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise DataError(problems)
    if not records:
        raise DataError([f"{path}: the file holds no record"])
    return records


def parse_preference(raw: Any, where: str) -> Preference:
    """One preference pair. Raises ValueError saying what is wrong with it."""
    prompt = _parse_prompt(raw, where, KNOWN | {"chosen", "rejected"})
    if prompt["image_type"] == "multi":
        raise ValueError("a multi prompt refers to no single image, so it is for test sets only: name a `target`")
    chosen, rejected = check_answer(_text(raw, "chosen")), check_answer(_text(raw, "rejected"))
    if chosen.strip() == rejected.strip():
        raise ValueError("chosen and rejected are the same text: there is nothing to prefer")
    return Preference(**prompt, chosen=chosen.strip(), rejected=rejected.strip())


def parse_question(raw: Any, where: str) -> Question:
    """One question of a test set, whose `answer` may be absent or null. Raises ValueError saying what is wrong."""
    if isinstance(raw, dict) and "chosen" in raw:
        _required(raw, "answer")  # a preference pair
    return Question(**_parse_prompt(raw, where, KNOWN | {"answer"}), answer=_true_answer(raw))


def _true_answer(raw: dict) -> str:
    return "" if raw.get("answer") is None else _text(raw, "answer").strip()


def _parse_prompt_of_any(raw: Any, where: str) -> Question:
    is_pair = isinstance(raw, dict) and "chosen" in raw and "answer" not in raw
    return parse_question({**raw, "answer": raw["chosen"]} if is_pair else raw, where)


def _parse_instruction(raw: Any, where: str) -> Question:
    if not isinstance(raw, dict):
        raise ValueError(f"a record must be a JSON object, not {type(raw).__name__}")
    is_refusal = raw.get("is_refusal", False)  # asks about a picture that is not there, on purpose
    flat = {**raw, **(_first_turn(raw) if "conversations" in raw else {}), **({"target": 1} if is_refusal else {})}
    known = KNOWN | {"answer", "conversations", "turn_targets"}
    question = Question(**_parse_prompt(flat, where, known), answer=check_answer(_text(flat, "answer")).strip())
    return replace(question, target=None) if is_refusal else question


def _first_turn(raw: dict) -> dict[str, Any]:
    turns = raw["conversations"]
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("`conversations` must be a list of at least two turns with `from` and `value`")
    if [turn.get("from") for turn in turns[:2]] != ["human", "gpt"]:
        raise ValueError("`conversations` must begin with a turn from human and one from gpt")
    return {"prompt": turns[0].get("value"), "answer": turns[1].get("value")}


def _parse_answer(raw: Any, where: str) -> Answer:
    if not isinstance(raw, dict):
        raise ValueError(f"a record must be a JSON object, not {type(raw).__name__}")
    question_id, text = _required(raw, "question_id"), _required(raw, "text")
    if not isinstance(question_id, str | int) or not isinstance(text, str):
        raise ValueError("`question_id` must be text or a whole number, and `text` must be text")
    image_type, num_images = raw.get("image_type"), raw.get("num_images")
    target = 1 if image_type == "multi" else raw.get("target", 1)
    if image_type not in FORMATS:
        raise ValueError(f"image_type {image_type!r} is none of {', '.join(FORMATS)}")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in (target, num_images)):
        raise ValueError("`target` and `num_images` must be whole numbers from 1")
    if image_type == "sequence" and target > num_images:
        raise ValueError(f"Image{target} does not exist: this record has Image1 to Image{num_images}")
    by_image = _shares(raw, "attention_by_image")
    is_separate = image_type in ("sequence", "multi")
    if by_image and (target > len(by_image) or (is_separate and len(by_image) != num_images)):
        raise ValueError(f"`attention_by_image` has {len(by_image)} shares for {num_images} images and Image{target}")
    ratio = raw.get("attention_ratio")
    return Answer(
        where, str(question_id), text, _true_answer(raw), image_type,
        None if image_type == "multi" else target - 1 if image_type in ("sequence", "collage") else 0, num_images,
        choices=texts(raw, "choices") or (), others=texts(raw, "others"),
        attention_ratio=None if ratio is None else _shares({"attention_ratio": [ratio]}, "attention_ratio")[0],
        attention_by_image=by_image,
        extra={key: value for key, value in raw.items() if key not in Answer.__dataclass_fields__},
    )  # fmt: skip


def texts(raw: dict, name: str) -> tuple[str, ...] | None:
    """A list of texts that a record may have, None without it; "" for a letter without an option (null in `choices`).

    Raises ValueError.
    """
    value = raw.get(name)
    if value is None:
        return None
    there = [v for v in value if v is not None or name != "choices"] if isinstance(value, list) else [None]
    if not all(isinstance(v, str) and v.strip() for v in there) or (value and not there):
        raise ValueError(f"`{name}` must be a list of texts, none of them empty")
    return tuple(v or "" for v in value)


def _shares(raw: dict, name: str) -> tuple[float, ...] | None:
    value = raw.get(name)
    if value is None:
        return None
    numbers = isinstance(value, list) and all(isinstance(v, int | float) and -1e-6 <= v <= 1 + 1e-6 for v in value)
    if not numbers or not value:
        raise ValueError(f"`{name}` must be between 0 and 1 (null where it was not measured)")
    return tuple(float(v) for v in value)


def _parse_prompt(raw: Any, where: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"a record must be a JSON object, not {type(raw).__name__}")
    images = _images(raw)
    prompt = _text(raw, "prompt").replace(PLACEHOLDER_OF_MIA_DPO, IMAGE)
    if prompt.count(IMAGE) != len(images):
        raise ValueError(f"the prompt has {prompt.count(IMAGE)} {IMAGE} but the record lists {len(images)} images")
    image_type, target = _what_is_asked(raw, prompt, len(images))
    return {
        "where": where,
        "id": str(raw.get("id", f"record_{where.rpartition(' ')[2]}")),  # by number, however the file's path is written
        "images": images,
        "prompt": prompt,
        "image_type": image_type,
        "target": target,
        "target_box": _box(raw),
        "grid": _grid(raw, target),
        "extra": {key: value for key, value in raw.items() if key not in known},
    }


def _what_is_asked(raw: dict, prompt: str, num_images: int) -> tuple[str, int | None]:
    """Format and 0-based target: from the record's fields, else from the prompt (`In Image(\\d+)`).

    `multi`, several images and no referred one, is never derived: a forgotten reference must not pass for it.
    """
    match = TARGET.search(prompt)
    derived = ("sequence" if num_images > 1 else "collage") if match else "pip"
    image_type = raw.get("image_type", derived)
    if image_type not in FORMATS:
        raise ValueError(f"image_type {image_type!r} is none of {', '.join(FORMATS)}")
    if image_type == "multi":
        return image_type, _no_target(raw, num_images)
    if image_type != "sequence" and num_images != 1:
        reason = "" if "image_type" in raw else " (no `In Image<k>` in the prompt, so it is read as pic-in-pic)"
        raise ValueError(f"a {image_type} prompt has one image, this record lists {num_images}{reason}")
    if image_type in ("pip", "single"):
        return image_type, 0
    target = raw.get("target", int(match[1]) if match else None)
    if not isinstance(target, int) or isinstance(target, bool):
        raise ValueError("which image is meant? Give `target` (1-based), or write `In Image<k>` in the prompt")
    if target < 1 or (image_type == "sequence" and target > num_images):
        limit = f"this record has Image1 to Image{num_images}" if image_type == "sequence" else "counting starts at 1"
        raise ValueError(f"Image{target} does not exist: {limit}")
    return image_type, target - 1


def _no_target(raw: dict, num_images: int) -> None:
    if num_images < 2:
        raise ValueError("a multi prompt has several images, this record lists 1: its image_type is `single`")
    given = [name for name in ("target", "target_box", "grid") if raw.get(name) is not None]
    if given:
        raise ValueError(f"a multi prompt refers to no image, but the record has `{given[0]}`: is it a sequence?")


def _images(raw: dict) -> tuple[str, ...]:
    images = _required(raw, "image")
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not images or not all(isinstance(i, str) and i for i in images):
        raise ValueError("`image` must be a path or a list of paths")
    return tuple(images)


def _text(raw: dict, name: str) -> str:
    value = _required(raw, name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{name}` is empty" if isinstance(value, str) else f"`{name}` must be text")
    return value


def _required(raw: dict, name: str) -> Any:
    if name not in raw:
        raise ValueError(f"the field `{name}` is missing; the record has {', '.join(sorted(raw)) or 'no field'}")
    return raw[name]


def _box(raw: dict) -> tuple[float, ...] | None:
    box = raw.get("target_box")
    if box is None:
        return None
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        raise ValueError("`target_box` must be [x0, y0, x1, y1] in pixels of the stored image")
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 and 0 <= y0 < y1):
        raise ValueError(f"`target_box` {box} has no area: it must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    return tuple(box)


def _grid(raw: dict, target: int | None) -> tuple[int, int] | None:
    grid = raw.get("grid")
    if grid is None:
        return None
    if not isinstance(grid, list) or len(grid) != 2 or not all(isinstance(v, int) and v > 0 for v in grid):
        raise ValueError("`grid` must be [rows, cols]")
    if target is not None and target >= grid[0] * grid[1]:
        raise ValueError(f"Image{target + 1} does not exist: the collage has {grid[0]} x {grid[1]} cells")
    return tuple(grid)


def check_answer(answer: str) -> str:
    """The answer itself. Raises ValueError if it holds `<image>` or what ends an answer; families refuse more."""
    for token in RESERVED:
        if token in answer:
            raise ValueError(f"an answer must not contain {token!r}")
    return answer
