"""Rows of public multi-image data sets on disk, what their columns mean, and the prompt that a row becomes.

Nothing is downloaded.

Sources of the column names: EvolvingLMMs-Lab/lmms-eval:lmms_eval/tasks/{blink,mantis,muirbench,mirb,qbench,
llava_interleave_bench}/utils.py, open-compass/VLMEvalKit:vlmeval/dataset/image_{base,mcq}.py,
LLaVA-VL/LLaVA-NeXT:llava/eval/model_vqa.py, TIGER-AI-Lab/Mantis:data/nlvr2/prepare_vqa_v3.py.
"""

import ast
import base64
import binascii
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from llava import tables
from llava.asked import named_in, target_fields
from llava.choices import same_text, true_choice
from llava.pixels import DECODER_ERRORS, as_seen
from llava.records import IMAGE, PLACEHOLDER_OF_MIA_DPO

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".tsv")
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # not data
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
EXTENSIONS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
IN_BASE64_FROM = 64  # characters; VLMEvalKit reads what is shorter as the index of the row that has the picture
CLOSING = "Answer with the option's letter from the given choices directly."
ABSENT = ("", "nan", "NaN", "N/A")  # of an option or a picture; "None" may be an option's text
WRITTEN_LISTS = {"image", "image_path", "images", "image_list", "options", "choices"}
PLACEHOLDER = re.compile(rf"<image[ _-]?(\d+)>|{IMAGE}|{PLACEHOLDER_OF_MIA_DPO}")
OWN_LABEL = r"\s*(?:\({0}\)|{0}[.:)])\s*"
CATEGORIES = ("category", "sub_task", "subtask", "task", "subset")  # columns that name a part of the set
MIRB_INSTRUCTIONS = {
    **dict.fromkeys(("analogy", "attribute", "plot_code", "visual_chain", "sightseeing"), "Answer with a single word."),
    **dict.fromkeys(("codeu", "food", "image_jigsaw"), "Answer with the option symbol."),
    "arxiv": "Answer with the paper title.",
    "count": "Answer with a single number.",
    "3d_scene": "The following images are different views of the same 3D scene. Answer with a single number.",
}


# ---- rows


def read_rows(source: Path, split: str | None = None) -> Iterator[tuple[Path, int, Any]]:
    """(file, number, row) of a file, a folder of files, or a folder made by `save_to_disk`, in order of path.

    The number counts from 0 through all files of a split, as lmms-eval's doc_id. A row's pictures are undecoded; one
    that cannot be read is the ValueError that says why. `split` chooses among several ("val", "Art_Style/val").
    Raises FileNotFoundError, DataError, ValueError.
    """
    for files in _splits(source, split).values():
        rows = ((path, row) for path in files for row in _rows(path))
        yield from ((path, number, row) for number, (path, row) in enumerate(rows))


def _splits(source: Path, split: str | None) -> dict[str, list[Path]]:
    """Files (or `save_to_disk` folders) of each split. Raises ValueError where it must be chosen first."""
    if not source.exists():
        raise FileNotFoundError(f"--source {source}: no such file or folder")
    found: dict[str, list[Path]] = {}
    for path in [source] if source.is_file() else _data(source):
        stem = SHARD.sub("", path.stem)
        name = stem if path == source else path.relative_to(source).with_name(stem).as_posix()
        found.setdefault(name, []).append(path)
    chosen = {name: files for name, files in found.items() if split in (None, name, name.rsplit("/", 1)[-1])}
    if not chosen or len({name.rsplit("/", 1)[-1] for name in chosen}) > 1:
        given = f"--split {split} is not there" if split else "several data sets: choose one with --split"
        names = ", ".join(found) or f"no file that ends in {', '.join(SUFFIXES)}"
        raise ValueError(f"{source}: {given if found else 'nothing to read'} (found {names})")
    return chosen


def _data(folder: Path) -> list[Path]:
    """Folders made by `save_to_disk`, and data files outside of them, in order of path."""
    saved = sorted(path.parent for path in folder.rglob("state.json"))
    files = (path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES and path.name not in DESCRIPTIONS)
    return saved + [path for path in files if path.is_file() and not any(own in path.parents for own in saved)]


def _rows(path: Path) -> Iterable[Any]:
    if path.is_file() and path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a data file ends in {', '.join(SUFFIXES)}")
    return read_tsv(path) if path.suffix == ".tsv" else tables.read_rows(path)


def read_tsv(path: Path) -> list[dict[str, Any] | ValueError]:
    """Rows of a VLMEvalKit table; an `image` that is another row's index is replaced by that row's."""
    rows = list(tables.read_rows(path))
    whole = [row for row in rows if isinstance(row, dict)]
    images = {row["index"]: row["image"] for row in whole if "image" in row and "index" in row}
    for row in whole:
        if row.get("image") and len(row["image"]) <= IN_BASE64_FROM:
            row["image"] = images.get(row["image"], row["image"])
    return rows


# ---- pictures


def picture_file(value: Any, folder: Path) -> tuple[bytes, str]:
    """Content and extension to store a picture under: the bytes that it has, or PNG where these are a rare format.

    `value` is bytes, {"bytes", "path"} of `datasets`, a path below `folder`, or base64 (also as data URL).
    Raises ValueError, FileNotFoundError.
    """
    content = _content(value, folder)
    try:
        with Image.open(io.BytesIO(content)) as picture:
            seen = as_seen(picture)
            if picture.format in EXTENSIONS:
                return content, EXTENSIONS[picture.format]
            stored = io.BytesIO()
            seen.save(stored, "PNG")
            return stored.getvalue(), ".png"
    except UnidentifiedImageError as error:
        raise ValueError("not a picture that pillow can read") from error
    except (*DECODER_ERRORS, Image.DecompressionBombError) as error:
        raise ValueError(f"truncated or damaged picture ({error})") from error


def _content(value: Any, folder: Path) -> bytes:
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") else value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"a picture cannot be read from {type(value).__name__}")
    if not value.startswith("data:image/") and len(value) < 4096 and (folder / value).is_file():
        return (folder / value).read_bytes()
    encoded = re.sub(r"^data:image/[^,]*,|\s", "", value)
    if len(encoded) <= IN_BASE64_FROM:
        raise FileNotFoundError(f"no picture {value} in {folder}: give --image_folder")
    try:
        return base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(f"neither a file in {folder} nor base64: {value[:40]}...") from error


# ---- what a row means


@dataclass(frozen=True)
class Columns:
    """Names of a data set's columns; patterns where it has one column a picture or an option."""

    index: str
    question: str
    answer: str
    images: str
    options: str = ""
    is_complete: bool = False  # its questions list their options and say how to answer


COLUMNS = {
    "blink": Columns("idx", "prompt", "answer", r"image_\d+", "choices"),
    "mantis_eval": Columns("id", "question", "answer", "images", "options"),
    "nlvr2": Columns("identifier|question_id|id", "sentence|question", "label|answer", r"[a-z]+_image|images"),
    "muirbench": Columns("idx", "question", "answer", "image_list", "options"),
    "mirb": Columns("question_id", "questions", "answers", "image_list", is_complete=True),
    "qbench2": Columns("id", "question", "correct_choice", r"image\d+", r"option\d+"),
    "lmms_eval": Columns(
        "id|idx|question_id|sample_id|index", "question|prompt|questions", "answer|answers|correct_choice|target",
        r"images|image_list|image_?\d+|image", r"options|choices|option\d+|[A-Z]",
    ),
    "vlmevalkit": Columns("index", "question", "answer", "image|image_path", "[A-Z]"),
    "llava_interleave": Columns("sample_id", "question", "answer", r"image_\d+|image", is_complete=True),
}  # fmt: skip


def record_of(source: str, row: dict[str, Any]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The test-set record of a row of `source`, a name in COLUMNS, and the row's pictures, which `image` numbers.

    Raises ValueError saying what is wrong with the row.
    """
    if isinstance(row, ValueError):  # of the table's reader
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a record must be an object, not {type(row).__name__}")
    columns = COLUMNS[source]
    question, answer, options = SPECIAL.get(source, _plain)(row, columns)
    index, images = str(_one(row, columns.index)), _several(row, columns.images)
    if not images and source == "nlvr2":  # its own JSON names them by the sentence: dev-850-0-0 is about dev-850-0
        images = tuple(f"{index.rpartition('-')[0]}-img{n}.png" for n in range(2))
    if not images:
        raise ValueError(f"no picture: the columns {columns.images} are missing or empty")
    if options:
        answer = letter_of(answer, options)
        question += "" if columns.is_complete else f"\n{CLOSING}"
    prompt, shown = prompt_of(question, len(images))
    choices = {"choices": [option or None for option in options]} if options else {}
    part = next((str(row[name]) for name in CATEGORIES if not _is_absent(row.get(name))), None)
    category = {"category": part} if part else {}
    record = {"id": index, "image": shown, "prompt": prompt, "answer": answer, **choices, **category}
    return record | region_of(prompt, len(shown)), images


def _plain(row: dict, columns: Columns) -> tuple[str, str, tuple[str, ...]]:
    """Question, answer, options; options that the question does not list are listed after it."""
    options = _without_labels(tuple("" if _is_absent(o) else str(o) for o in _several(row, columns.options, True)))
    labelled = [(_letter(n), option) for n, option in enumerate(options) if option]
    question, answer = _text(row, columns.question), _text(row, columns.answer)
    if not all(re.search(rf"\({letter}\)", question) for letter, _ in labelled):
        question = "\n".join([question, *(f"({letter}) {option}" for letter, option in labelled)])
    hint = row.get("hint")
    return question if _is_absent(hint) else f"{hint}\n{question}", answer, options


def _statement(row: dict, columns: Columns) -> tuple[str, str, tuple[str, ...]]:
    """NLVR2 as Mantis asks it, except that the options keep their order."""
    if "options" in row:
        return _plain(row, COLUMNS["mantis_eval"])
    sentence = "Here is a statement about the images. Is it true or false?\n" + _text(row, columns.question)
    label = _text(row, columns.answer)
    return f"{sentence}\n(A) True\n(B) False", {"1": "True", "0": "False"}.get(label, label), ("True", "False")


def _instructed(row: dict, columns: Columns) -> tuple[str, str, tuple[str, ...]]:
    """MIRB: an instruction for each subset; the options of multiple choice stand in the question."""
    question, answer, subset = _text(row, columns.question), _text(row, columns.answer), row.get("subset")
    if subset not in MIRB_INSTRUCTIONS:
        raise ValueError(f"the subset {subset!r} is none of {', '.join(MIRB_INSTRUCTIONS)}")
    options = listed_options(question) if re.fullmatch("[A-E]", answer) else ()
    return f"{MIRB_INSTRUCTIONS[subset]}\n{question}", answer, options


def _conversation(row: dict, columns: Columns) -> tuple[str, str, tuple[str, ...]]:
    """LLaVA-Interleave-Bench: as JSON with a conversation, or as columns; its prompts stay as they are."""
    if (turns := row.get("conversations")) is not None:
        if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError("`conversations` must be one question and its answer")
        metadata = row.get("metadata")
        row = metadata if isinstance(metadata, dict) else {}
        row = row | {name: _text(turn, "value") for name, turn in zip(("question", "answer"), turns, strict=True)}
    question, answer = _text(row, columns.question), _text(row, columns.answer)
    options = listed_options(question) if row.get("question_type") == "multi-choice" else ()
    if options and not re.fullmatch(r"\W*[A-Za-z]\W*", answer) and len(same_text(answer, options)) != 1:
        options = ()  # what the question lists with letters is not what it asks for
    return question, answer, options


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
    number, same = ord(lone[1].upper()) - ord("A") if lone else len(options), same_text(answer, options)
    if number >= len(options) or not options[number]:
        if len(same) != 1:
            limit = f"a letter from A to {_letter(len(options) - 1)}"
            raise ValueError(f"the answer {answer!r} is neither {limit} nor the text of an option")
        number = same[0]
    for text in (_letter(number), options[number]):  # the letter, unless it is read as another option's text
        if true_choice(text, options) == number:
            return text
    raise ValueError(f"the answer {answer!r} cannot be told from the options {', '.join(options)}")


def _without_labels(options: tuple[str, ...]) -> tuple[str, ...]:
    """Texts of options; where every one begins with its own label ("(A) red"), without it."""
    labels = [re.match(OWN_LABEL.format(_letter(n)) + r"(?=\S)", option or f"({_letter(n)}) -")
              for n, option in enumerate(options)]  # fmt: skip
    return tuple(o and o[label.end() :] for o, label in zip(options, labels, strict=True)) if all(labels) else options


def _letter(number: int) -> str:
    return chr(ord("A") + number)


# ---- the prompt


def prompt_of(question: str, num_images: int) -> tuple[str, list[int]]:
    """The prompt with one `<image>` where each picture is shown, and the pictures (from 0) in that order.

    Pictures that the question gives no place stand before it, a line each. Raises ValueError where it shows some of
    them only, or others.
    """
    places = [match[1] for match in PLACEHOLDER.finditer(question)]
    if not places:
        return f"{IMAGE}\n" * num_images + question, list(range(num_images))
    if None in places and any(places):
        raise ValueError("some image placeholders have a number and some have none")
    shown = list(range(len(places))) if None in places else [int(place) - 1 for place in places]
    if set(shown) != set(range(num_images)):
        numbers = "" if None in places else f" (numbers {', '.join(places)})"
        raise ValueError(f"{len(places)} image placeholders{numbers} for {num_images} pictures")
    return PLACEHOLDER.sub(IMAGE, question), shown


def region_of(prompt: str, num_images: int) -> dict[str, Any]:
    """`image_type`, and the targets where the prompt refers to some of its images as ours do ("In Image2, ...")."""
    if num_images == 1:
        return {"image_type": "single"}
    found = named_in(prompt)
    named = {int(number) for number in re.findall(r"(?i)\bImage ?(\d+)\b(?!\s*:)", prompt)}
    numbers = next(iter(found)) if len(found) == 1 else {0}
    is_all_named = named == numbers or (len(numbers) > 1 and not named)  # "Images 1 and 3" has no "Image 1"
    if is_all_named and len(numbers) < num_images and numbers <= set(range(1, num_images + 1)):
        return {"image_type": "sequence", **target_fields([number - 1 for number in sorted(numbers)])}
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
