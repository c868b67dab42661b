"""What the columns of public multi-image data sets mean, and the prompt that a row of them becomes.

Sources of the column names: EvolvingLMMs-Lab/lmms-eval:lmms_eval/tasks/{blink,mantis,muirbench,mirb,qbench,
llava_interleave_bench}/utils.py, open-compass/VLMEvalKit:vlmeval/dataset/image_{base,mcq}.py,
LLaVA-VL/LLaVA-NeXT:llava/eval/model_vqa.py, TIGER-AI-Lab/Mantis:data/nlvr2/prepare_vqa_v3.py.
"""

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llava.records import IMAGE, PLACEHOLDER_OF_MIA_DPO, TARGET
from llava.scorers import normalise, true_choice

CLOSING = "Answer with the option's letter from the given choices directly."
ABSENT = ("", "nan", "NaN", "N/A")  # of an option or a picture; "None" may be an option's text
WRITTEN_LISTS = {"image", "image_path", "images", "image_list", "options", "choices"}
PLACEHOLDER = re.compile(rf"<image[ _-]?(\d+)>|{IMAGE}|{PLACEHOLDER_OF_MIA_DPO}")
OWN_LABEL = r"\s*(?:\({0}\)|{0}[.:)])\s*"
MIRB_INSTRUCTIONS = {
    **dict.fromkeys(("analogy", "attribute", "plot_code", "visual_chain", "sightseeing"), "Answer with a single word."),
    **dict.fromkeys(("codeu", "food", "image_jigsaw"), "Answer with the option symbol."),
    "arxiv": "Answer with the paper title.",
    "count": "Answer with a single number.",
    "3d_scene": "The following images are different views of the same 3D scene. Answer with a single number.",
}


@dataclass(frozen=True)
class Columns:
    """Names of a data set's columns; patterns where it has one column a picture or an option."""

    index: str
    question: str
    answer: str
    images: str
    options: str


COLUMNS = {
    "blink": Columns("idx", "prompt", "answer", r"image_\d+", "choices"),
    "mantis_eval": Columns("id", "question", "answer", "images", "options"),
    "nlvr2": Columns("identifier|question_id|id", "sentence|question", "label|answer", r"[a-z]+_image|images", ""),
    "muirbench": Columns("idx", "question", "answer", "image_list", "options"),
    "mirb": Columns("question_id", "questions", "answers", "image_list", ""),
    "qbench2": Columns("id", "question", "correct_choice", r"image\d+", r"option\d+"),
    "lmms_eval": Columns(
        "id|idx|question_id|sample_id|index", "question|prompt|questions", "answer|answers|correct_choice|target",
        r"images|image_list|image_?\d+|image", r"options|choices|option\d+|[A-Z]",
    ),
    "vlmevalkit": Columns("index", "question", "answer", "image|image_path", "[A-Z]"),
    "llava_interleave": Columns("sample_id", "question", "answer", r"image_\d+|image", ""),
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A row, understood: the question with the data set's own placeholders, and what is shown and asked."""

    index: str
    question: str
    images: tuple[Any, ...]
    answer: str  # a letter where there are options
    options: tuple[str, ...]  # "" where the row has none for a letter
    is_complete: bool = False  # the question lists its options and says how to answer


def item_of(source: str, row: dict[str, Any]) -> Item:
    """Read a row of the data set `source`, a name in COLUMNS. Raises ValueError saying what is wrong with it."""
    if isinstance(row, ValueError):  # of the table's reader
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a record must be an object, not {type(row).__name__}")
    question, answer, options, is_complete = SPECIAL.get(source, _plain)(row, COLUMNS[source])
    index, images = str(_one(row, COLUMNS[source].index)), _several(row, COLUMNS[source].images)
    if not images and source == "nlvr2":  # its own JSON names them by the sentence: dev-850-0-0 is about dev-850-0
        images = tuple(f"{index.rpartition('-')[0]}-img{n}.png" for n in range(2))
    if not images:
        raise ValueError(f"no picture: the columns {COLUMNS[source].images} are missing or empty")
    if options:
        answer = letter_of(answer, options)
    return Item(index, question, images, answer, options, is_complete)


def _plain(row: dict, columns: Columns) -> tuple[str, str, tuple[str, ...], bool]:
    options = _without_labels(tuple("" if _is_absent(o) else str(o) for o in _several(row, columns.options, True)))
    labelled = [(_letter(n), option) for n, option in enumerate(options) if option]
    question, answer = _text(row, columns.question), _text(row, columns.answer)
    hint = row.get("hint")
    is_listed = bool(options) and all(re.search(rf"\({letter}\)", question) for letter, _ in labelled)
    if not is_listed and options:
        question = "\n".join([question, *(f"({letter}) {option}" for letter, option in labelled)])
    return f"{hint}\n{question}" if not _is_absent(hint) else question, answer, options, False


def _statement(row: dict, columns: Columns) -> tuple[str, str, tuple[str, ...], bool]:
    """NLVR2 as Mantis asks it, except that the options keep their order."""
    if "options" in row:
        return _plain(row, COLUMNS["mantis_eval"])
    sentence = "Here is a statement about the images. Is it true or false?\n" + _text(row, columns.question)
    label = {"1": "True", "0": "False"}.get(text := _text(row, columns.answer), text)
    return f"{sentence}\n(A) True\n(B) False", label, ("True", "False"), False


def _instructed(row: dict, columns: Columns) -> tuple[str, str, tuple[str, ...], bool]:
    """MIRB: an instruction for each subset; the options of multiple choice stand in the question."""
    question, answer, subset = _text(row, columns.question), _text(row, columns.answer), row.get("subset")
    if subset not in MIRB_INSTRUCTIONS:
        raise ValueError(f"the subset {subset!r} is none of {', '.join(MIRB_INSTRUCTIONS)}")
    options = listed_options(question) if re.fullmatch("[A-E]", answer) else ()
    return f"{MIRB_INSTRUCTIONS[subset]}\n{question}", answer, options, True


def _conversation(row: dict, columns: Columns) -> tuple[str, str, tuple[str, ...], bool]:
    """LLaVA-Interleave-Bench: as JSON with a conversation, or as columns; its prompts stay as they are."""
    turns = row.get("conversations")
    if turns is None:
        question, answer = _text(row, columns.question), _text(row, columns.answer)
        kind = row.get("question_type")
    else:
        if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError("`conversations` must be one question and its answer")
        question, answer = (_text(turn, "value") for turn in turns)
        metadata = row.get("metadata")
        kind = metadata.get("question_type") if isinstance(metadata, dict) else None
    options = listed_options(question) if kind == "multi-choice" else ()
    if options and not re.fullmatch(r"\W*[A-Za-z]\W*", answer) and _same(answer, options) is None:
        options = ()  # what the question lists with letters is not what it asks for
    return question, answer, options, True


SPECIAL: dict[str, Callable] = {"nlvr2": _statement, "mirb": _instructed, "llava_interleave": _conversation}


# ---- options and answers


def listed_options(question: str) -> tuple[str, ...]:
    """Options that a question lists after labels from A on, one a line or in a row; () where it lists none."""
    for pattern in (r"(?m)^\s*\(?([A-H])[).:]\s*(\S.*?)\s*$", r"\(([A-H])\)\s*([^()\n]*[^()\s,;])"):
        found = re.findall(pattern, question)
        if len(found) > 1 and [label for label, _ in found] == [_letter(n) for n in range(len(found))]:
            return tuple(text for _, text in found)
    return ()


def letter_of(answer: str, options: Sequence[str]) -> str:
    """The true option as scoring reads it back: its letter, or its text where the letter is another option's text.

    Raises ValueError where the answer is neither the letter nor the text of one option.
    """
    lone = re.fullmatch(r"\W*([A-Za-z])\W*", answer)
    number = ord(lone[1].upper()) - ord("A") if lone else _same(answer, options)
    if lone and not (number < len(options) and options[number]):
        number = _same(answer, options)
    if number is None:
        raise ValueError(
            f"the answer {answer!r} is neither a letter from A to {_letter(len(options) - 1)} nor the text of an option"
        )
    for text in (_letter(number), options[number]):  # the letter, unless it is read as another option's text
        if true_choice(text, options) == number:
            return text
    raise ValueError(f"the answer {answer!r} cannot be told from the options {', '.join(options)}")


def _same(answer: str, options: Sequence[str]) -> int | None:
    same = [number for number, option in enumerate(options) if normalise(option) == normalise(answer)]
    return same[0] if len(same) == 1 else None


def _without_labels(options: tuple[str, ...]) -> tuple[str, ...]:
    """Texts of options; where every one begins with its own label ("(A) red"), without it."""
    labels = [re.match(OWN_LABEL.format(_letter(n)) + r"(?=\S)", option or f"({_letter(n)}) -")
              for n, option in enumerate(options)]  # fmt: skip
    return tuple(o and o[label.end() :] for o, label in zip(options, labels, strict=True)) if all(labels) else options


def _letter(number: int) -> str:
    return chr(ord("A") + number)


# ---- the prompt


def prompt_of(item: Item) -> tuple[str, list[int]]:
    """The prompt with one `<image>` where each picture is shown, and the pictures (from 0) in that order.

    Pictures that the question gives no place stand before it, a line each. Raises ValueError where it shows some of
    them only, or others.
    """
    text = item.question if item.is_complete or not item.options else f"{item.question}\n{CLOSING}"
    places = [match[1] for match in PLACEHOLDER.finditer(text)]
    if not places:
        return f"{IMAGE}\n" * len(item.images) + text, list(range(len(item.images)))
    is_numbered = [place is not None for place in places]
    if any(is_numbered) and not all(is_numbered):
        raise ValueError("some image placeholders have a number and some have none")
    shown = [int(place) - 1 for place in places] if all(is_numbered) else list(range(len(places)))
    if set(shown) != set(range(len(item.images))):
        numbers = f" (numbers {', '.join(places)})" if all(is_numbered) else ""
        raise ValueError(f"{len(places)} image placeholders{numbers} for {len(item.images)} pictures")
    return PLACEHOLDER.sub(IMAGE, text), shown


def region_of(prompt: str, num_images: int) -> dict[str, Any]:
    """`image_type`, and `target` where the prompt refers to one of its images as ours do ("In Image2, ...")."""
    if num_images == 1:
        return {"image_type": "single"}
    match = TARGET.search(prompt)
    named = {int(number) for number in re.findall(r"(?i)\bImage ?(\d+)\b(?!\s*:)", prompt)}
    if match and len(named) == 1 and 1 <= int(match[1]) <= num_images:
        return {"image_type": "sequence", "target": int(match[1])}
    return {"image_type": "multi"}


# ---- columns


def _one(row: dict, names: str) -> Any:
    found = [row[name] for name in names.split("|") if name in row]
    if not found:
        wanted = " or ".join(f"`{name}`" for name in names.split("|"))
        raise ValueError(f"the column {wanted} is missing; the record has {', '.join(map(str, row)) or 'none'}")
    value = next((value for value in found if not _is_absent(value)), None)
    if value is None:
        raise ValueError(f"`{names.split('|')[0]}` is empty")
    return value


def _text(row: dict, names: str) -> str:
    value = _one(row, names)
    if not isinstance(value, str | int | float):
        raise ValueError(f"`{names.split('|')[0]}` must be text, not {type(value).__name__}")
    return str(value).strip()


def _several(row: dict, pattern: str, may_have_gaps: bool = False) -> tuple[Any, ...]:
    """Values of a list column, or of the columns that the pattern names, in order; absent ones at the end left out.

    Alternatives of the pattern are tried in turn. Raises ValueError where one is absent before one that is there,
    unless it may be: an option keeps its letter.
    """
    for names in pattern.split("|") if pattern else ():
        columns = sorted((name for name in row if re.fullmatch(names, name)), key=lambda name: (len(name), name))
        values = [value for name in columns for value in _elements(name, row[name])]
        while values and _is_absent(values[-1]):
            values.pop()
        if any(map(_is_absent, values)) and not may_have_gaps:
            raise ValueError(f"`{columns[0]}` and what follows it have a gap")
        if values:
            return tuple(values)
    return ()


def _elements(name: str, value: Any) -> list[Any]:
    """What a column holds: a list, one that is written as text (as VLMEvalKit and MMMU do), or one value."""
    if isinstance(value, str) and name in WRITTEN_LISTS and re.fullmatch(r"(?s)\s*\[.*\]\s*", value):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"`{name}` looks like a list, but is none ({value[:40]}...)") from error
    return value if isinstance(value, list) else [value]


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.strip() in ABSENT) or value != value
