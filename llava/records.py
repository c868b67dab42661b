"""The files that pass between stages: how they are read, and what is refused.

A record's targets are 1-based in files and prompts ("Image1") and 0-based inside; they are converted here, once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llava.asked import FORMATS, IMAGE, answered_targets, the_one, what_is_asked
from llava.messages import one_line
from llava.strict_json import check_text, read_json

RESERVED = (IMAGE, "</s>")  # of no answer, whatever the model
PLACEHOLDER_OF_MIA_DPO = "<image-placeholder>"
KNOWN = {"id", "image", "prompt", "image_type", "target", "targets", "target_box", "grid", "context"}


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
    prompt: str  # with one `<image>` per image, those of earlier turns apart
    image_type: str  # one of FORMATS
    targets: tuple[int, ...]  # 0-based images of a sequence or cells of a collage, ascending; () for multi; else (0,)
    target_box: tuple[float, float, float, float] | None  # x0, y0, x1, y1 in px of the stored image
    grid: tuple[int, int] | None  # rows, cols of a collage
    extra: dict[str, Any] = field(default_factory=dict, repr=False)  # unknown fields, passed on
    context: tuple[tuple[str, str], ...] = ()  # (role, text) before the prompt: a system text, earlier turns in pairs
    is_derived: bool = False  # whether the format follows from the prompt, because no field says it

    @property
    def target(self) -> int | None:
        """The one target; None without, or with several."""
        return the_one(self.targets)

    @property
    def is_search(self) -> bool:
        """Whether the prompt looks for its targets: where the answer lies, which nothing that answers may be told."""
        return self.extra.get("is_search") is True


@dataclass(frozen=True)
class Preference(Prompt):
    """A prompt with a better (`chosen`) and one or several worse (`rejected`) answers."""

    chosen: str = ""
    rejected: tuple[str, ...] = ()


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
    targets: tuple[int, ...]  # as of `Prompt`
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


def name_of(path: str | Path, number: int, raw: Any) -> str:
    """How messages name a record: file, number from 1, id if it has one."""
    key = next((key for key in ("id", "question_id") if isinstance(raw, dict) and key in raw), None)
    return f"{path} record {number}" + (f" (id {one_line(str(raw[key]), 80)})" if key else "")


def read_records(path: str | Path, parse: Callable[[Any, str], Any]) -> list:
    """What `parse` makes of every record and its name. Raises DataError with a line for each that it refuses."""
    records, problems = parse_records(path, parse)
    if problems:
        raise DataError(problems)
    if not records:
        raise DataError([f"{path}: the file holds no record"])
    return records


def parse_records(
    path: str | Path, parse: Callable[[Any, str], Any], leave_out: frozenset[str] = frozenset()
) -> tuple[list, list[str]]:
    """(what `parse` makes of the records that it takes, a line for each that it refuses).

    Records that `leave_out` names, by their id or as "record N", are not looked at.
    """
    records, problems = [], []
    for number, raw in enumerate(read_json(path), 1):
        where = name_of(path, number, raw)
        if f"record {number}" in leave_out or (isinstance(raw, dict) and str(raw.get("id")) in leave_out):
            continue
        try:
            records.append(parse(raw, where))
        except ValueError as error:
            problems.append(f"{where}: {error}")
    return records, problems


def parse_preference(raw: Any, where: str) -> Preference:
    """One preference pair. Raises ValueError saying what is wrong with it."""
    prompt = _parse_prompt(raw, where, KNOWN | {"chosen", "rejected"})
    if prompt["image_type"] == "multi":
        raise ValueError("a multi prompt refers to no single image, so it is for test sets only: name a `target`")
    chosen, rejected = check_answer(_text(raw, "chosen")).strip(), _rejected(raw)
    if chosen in rejected:
        raise ValueError("chosen and rejected are the same text: there is nothing to prefer")
    return Preference(**prompt, chosen=chosen, rejected=rejected)


def _rejected(raw: dict) -> tuple[str, ...]:
    given = _required(raw, "rejected")
    if not isinstance(given, list):
        return (check_answer(_text(raw, "rejected")).strip(),)
    answers = tuple(check_answer(text).strip() for text in texts(raw, "rejected") or ())
    if not answers:
        raise ValueError("`rejected` is empty")
    if len(set(answers)) < len(answers):
        raise ValueError("`rejected` must be a text, or a list of different texts")
    return answers


def parse_question(raw: Any, where: str) -> Question:
    """One question of a test set, whose `answer` may be absent or null. Raises ValueError saying what is wrong."""
    if isinstance(raw, dict) and "chosen" in raw:
        _required(raw, "answer")  # a preference pair
    question = Question(**_parse_prompt(raw, where, KNOWN | {"answer"}), answer=_true_answer(raw))
    _check_texts(raw)
    return question


def _true_answer(raw: dict) -> str:
    return "" if raw.get("answer") is None else _text(raw, "answer").strip()


def _parse_prompt_of_any(raw: Any, where: str) -> Question:
    is_pair = isinstance(raw, dict) and "chosen" in raw and "answer" not in raw
    return parse_question({**raw, "answer": raw["chosen"]} if is_pair else raw, where)


def _parse_instruction(raw: Any, where: str) -> Question:
    _check_object(raw)
    is_refusal = raw.get("is_refusal", False)  # asks about a picture that is not there, on purpose
    flat = {**raw, **(_first_turn(raw) if "conversations" in raw else {})}
    flat |= {"target": 1, "targets": None} if is_refusal else {}
    known = KNOWN | {"answer", "conversations", "turn_targets"}
    parsed = _parse_prompt(flat, where, known, names_nothing=is_refusal)
    question = Question(**parsed, answer=check_answer(_text(flat, "answer")).strip())
    _check_texts(flat)
    return replace(question, targets=()) if is_refusal else question


def _first_turn(raw: dict) -> dict[str, Any]:
    turns = raw["conversations"]
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("`conversations` must be a list of at least two turns with `from` and `value`")
    if [turn.get("from") for turn in turns[:2]] != ["human", "gpt"]:
        raise ValueError("`conversations` must begin with a turn from human and one from gpt")
    return {"prompt": turns[0].get("value"), "answer": turns[1].get("value")}


def _parse_answer(raw: Any, where: str) -> Answer:
    _check_object(raw)
    question_id, text = _required(raw, "question_id"), _required(raw, "text")
    if not isinstance(question_id, str | int) or not isinstance(text, str):
        raise ValueError("`question_id` must be text or a whole number, and `text` must be text")
    image_type, num_images = raw.get("image_type"), raw.get("num_images")
    if image_type not in FORMATS:
        raise ValueError(f"image_type {image_type!r} is none of {', '.join(FORMATS)}")
    if not _is_count(num_images):
        raise ValueError("`num_images` must be a whole number from 1")
    targets = answered_targets(raw, image_type, num_images)
    target = targets[-1] + 1 if targets else 1
    by_image = _shares(raw, "attention_by_image")
    is_separate = image_type in ("sequence", "multi")
    if by_image and (target > len(by_image) or (is_separate and len(by_image) != num_images)):
        raise ValueError(f"`attention_by_image` has {len(by_image)} shares for {num_images} images and Image{target}")
    ratio = raw.get("attention_ratio")
    return Answer(
        where, str(question_id), text, _true_answer(raw), image_type,
        targets, num_images, choices=texts(raw, "choices") or (), others=texts(raw, "others"),
        attention_ratio=None if ratio is None else _shares({"attention_ratio": [ratio]}, "attention_ratio")[0],
        attention_by_image=by_image,
        extra={key: value for key, value in raw.items() if key not in {"target", *Answer.__dataclass_fields__}},
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
    numbers = isinstance(value, list) and all(_is_number(v) and -1e-6 <= v <= 1 + 1e-6 for v in value)
    if not numbers or not value:
        raise ValueError(f"`{name}` must be between 0 and 1 (null where it was not measured)")
    return tuple(float(v) for v in value)


def _parse_prompt(raw: Any, where: str, known: set[str], names_nothing: bool = False) -> dict[str, Any]:
    _check_object(raw)
    images, context = _images(raw), context_of(raw)
    prompt = _text(raw, "prompt").replace(PLACEHOLDER_OF_MIA_DPO, IMAGE)
    asked = [*(text for role, text in context if role == "user"), prompt]
    found = sum(text.count(IMAGE) for text in asked)
    if found != len(images):
        raise ValueError(f"the prompt has {found} {IMAGE} but the record lists {len(images)} images")
    image_type, targets = what_is_asked(raw, [""] if names_nothing else asked, len(images))
    return {
        "where": where,
        "id": str(raw.get("id", f"record_{where.rpartition(' ')[2]}")),  # by number, however the file's path is written
        "images": images,
        "prompt": prompt,
        "image_type": image_type,
        "targets": targets,
        "target_box": _box(raw),
        "grid": _grid(raw, targets),
        "extra": {key: value for key, value in raw.items() if key not in known},
        "context": context,
        "is_derived": raw.get("image_type") is None,
    }


def messages(context: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """A context as records have it."""
    return [{"role": role, "content": text} for role, text in context]


def transcript(context: Sequence[tuple[str, str]], prompt: str) -> str:
    """A prompt with what was said before it, as one text."""
    return "\n\n".join(f"{role}: {text}" for role, text in (*context, ("user", prompt))) if context else prompt


def context_of(raw: dict) -> tuple[tuple[str, str], ...]:
    """What is said before the prompt. Raises ValueError."""
    given = raw.get("context") or []
    if not isinstance(given, list) or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in given):
        raise ValueError("`context` must be a list of messages, each with `role` and `content` (text)")
    found = tuple((m.get("role"), m["content"].replace(PLACEHOLDER_OF_MIA_DPO, IMAGE).strip()) for m in given)
    roles = [role for role, _ in found]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise ValueError("`context` must be a system message, if any, then user and assistant in turns")
    if not all(text for _, text in found):
        raise ValueError("`context` has an empty message")
    for role, text in found:
        if role != "user":
            check_answer(text)
    return found


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
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise ValueError("`target_box` must be [x0, y0, x1, y1] in pixels of the stored image")
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 and 0 <= y0 < y1):
        raise ValueError(f"`target_box` {box} has no area: it must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    return tuple(box)


def _grid(raw: dict, targets: tuple[int, ...]) -> tuple[int, int] | None:
    grid = raw.get("grid")
    if grid is None:
        return None
    if not isinstance(grid, list) or len(grid) != 2 or not all(map(_is_count, grid)):
        raise ValueError("`grid` must be [rows, cols]")
    if targets and targets[-1] >= grid[0] * grid[1]:
        raise ValueError(f"Image{targets[-1] + 1} does not exist: the collage has {grid[0]} x {grid[1]} cells")
    return tuple(grid)


def _check_object(raw: Any) -> None:
    if not isinstance(raw, dict):
        raise ValueError(f"a record must be a JSON object, not {type(raw).__name__}")
    check_text(raw)


def _check_texts(raw: dict) -> None:
    for name in ("choices", "others"):
        texts(raw, name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_answer(answer: str) -> str:
    """The answer itself. Raises ValueError if it holds `<image>` or what ends an answer; families refuse more."""
    for token in RESERVED:
        if token in answer:
            raise ValueError(f"an answer must not contain {token!r}")
    return answer
