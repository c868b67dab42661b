"""Which images a prompt is about: its format and targets, said by a record's fields or by the prompt's words."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

FORMATS = ("sequence", "collage", "pip", "single", "multi")
IMAGE = "<image>"  # stands in a prompt for each picture
AND = r"\s*,?\s*(?:and|or|&)\s*"
ROW = rf"\s*\d+(?:\s*,\s*\d+)*{AND}\d+"  # "1, 2 and 4"
TARGET = re.compile(  # names what a prompt is about: "in Image2", "in Image1, Image2 and Image4", "in Images 1 and 3"
    rf"\bin\s+(?:images{ROW}|image{ROW}(?=\s*[,.:?!])|image\s*\d+(?:(?:\s*,\s*image\s*\d+)*{AND}image\s*\d+)?)",
    re.IGNORECASE,
)
# How it names the inner picture of a pic-in-pic: in a phrase before the first comma.
PICTURE = r"(?:image|picture|photo|photograph|plot|subplot|figure|scene|shot)"
CENTRE = r"(?:cent(?:re|er|ral)|middle|inner|inset|embedded|smaller|inside the other|surrounded by|on top)"
PIC_IN_PIC = re.compile(rf"(?=[^,]*\b{CENTRE}\b)(?:[^,.?!]*\b{PICTURE}\b[^,.?!]*|(?:in|at) the \w+),", re.IGNORECASE)


def placeholders(image_type: str, num_pictures: int) -> str:
    """What stands before the question: of several pictures a numbered line for each."""
    if image_type not in ("sequence", "multi"):
        return f"{IMAGE}\n"
    return "".join(f"Image{number}:{IMAGE}\n" for number in range(1, num_pictures + 1))


def what_is_asked(raw: dict, asked: Sequence[str], num_images: int) -> tuple[str, tuple[int, ...]]:
    """Format and 0-based targets: from the record's fields, else from the prompt, the last of the turns `asked`.

    `multi`, several images and no referred one, is never derived: a forgotten reference must not pass for it. Raises
    ValueError where they contradict each other, unless the record says that it `points_elsewhere`.
    """
    image_type, given, is_search = raw.get("image_type"), given_targets(raw), _is_search(raw)
    mentions = next(filter(None, map(named_in, [asked[-1]] if is_search else reversed(asked))), frozenset())
    named = frozenset().union(*mentions)
    if image_type is None:
        image_type = _derived(raw, asked[-1], bool(named), num_images)
    if image_type not in FORMATS:
        raise ValueError(f"image_type {image_type!r} is none of {', '.join(FORMATS)}")
    if image_type == "multi":
        return image_type, _no_target(raw, num_images)
    if image_type != "sequence" and num_images != 1:
        raise ValueError(f"a {image_type} prompt has one image, this record lists {num_images}")
    is_whole, elsewhere = image_type in ("pip", "single"), raw.get("points_elsewhere") is True
    if is_whole and (is_search or raw.get("targets") is not None):
        name = "is_search" if is_search else "targets"
        raise ValueError(f"`{name}` is for a sequence or a collage, and this is a {image_type} prompt")
    if is_search and (named or given is None):
        raise ValueError(
            f"`is_search` is for a prompt that names no image, and this one names {image_names(named)}" if named
            else "`is_search` needs `targets`: the images (1-based) that fit"
        )  # fmt: skip
    if given is None and len(mentions) > 1 and not (is_whole and elsewhere):
        raise ValueError(f"the prompt names {image_names(named)}: which one is meant? Give `target` (1-based)")
    if given is not None and named and not given <= named and not elsewhere:
        said = f"`target` is {min(given)}" if len(given) == 1 else f"`targets` are {sorted(given)}"
        raise ValueError(f"{said}, but the prompt names {image_names(named)}")
    if is_whole:
        if named - {1} and not elsewhere:
            names = image_names(named)
            raise ValueError(f"the prompt names {names}, but a {image_type} prompt has one image and no cells")
        return image_type, (0,)
    return image_type, _in_range(raw, given or named, num_images if image_type == "sequence" else None)


def named_in(text: str) -> frozenset[frozenset[int]]:
    """The different sets of images, from 1, that a text names: one of them for each "in ..."."""
    return frozenset(frozenset(map(int, re.findall(r"\d+", match[0]))) for match in TARGET.finditer(text))


def given_targets(raw: dict) -> frozenset[int] | None:
    """The images, from 1, that the fields `target` and `targets` give; None without both. Raises ValueError."""
    target, targets = raw.get("target"), raw.get("targets")
    if target is not None and not _is_whole_number(target):
        raise ValueError(f"`target` must be a whole number from 1, not {json.dumps(target)[:40]}")
    if targets is None:
        return None if target is None else frozenset({target})
    is_list = isinstance(targets, list) and targets and all(map(_is_whole_number, targets))
    if not is_list or len(set(targets)) < len(targets):
        raise ValueError(f"`targets` must be a list of different whole numbers from 1, not {json.dumps(targets)[:40]}")
    if target is not None and targets != [target]:
        raise ValueError(f"`target` is {target}, but `targets` are {targets}: give one of the two")
    return frozenset(targets)


def answered_targets(raw: dict, image_type: str, num_images: int) -> tuple[int, ...]:
    """0-based targets of what an answer was given to. Raises ValueError."""
    if image_type == "multi":
        return ()
    numbers = given_targets({"target": None if "targets" in raw else 1, **raw}) or frozenset()
    targets = _in_range({}, numbers, num_images if image_type == "sequence" else None)
    return targets if image_type in ("sequence", "collage") else (0,)


def the_one(targets: Sequence[int]) -> int | None:
    """The target of a prompt that has one; None without, or with several."""
    return targets[0] if len(targets) == 1 else None


def target_fields(targets: Sequence[int]) -> dict[str, Any]:
    """0-based targets as files have them: `target`, and of several its null beside `targets`."""
    if len(targets) > 1:
        return {"target": None, "targets": [target + 1 for target in targets]}
    return {"target": targets[0] + 1 if targets else None}


def in_digests(targets: tuple[int, ...]) -> int | tuple[int, ...] | None:
    """Targets as digests of questions hold them: one as a number, as ever."""
    return targets if len(targets) > 1 else the_one(targets)


def image_names(numbers: Iterable[int]) -> str:
    """"Image1, Image2 and Image4", of numbers from 1, at least one."""
    *first, last = (f"Image{number}" for number in sorted(numbers))
    return f"{', '.join(first)} and {last}" if first else last


def _in_range(raw: dict, numbers: frozenset[int], num_images: int | None) -> tuple[int, ...]:
    """The numbers as 0-based targets; of a sequence, whose images are known, among them."""
    if not numbers:
        raise ValueError("which image is meant? Give `target` (1-based), or write `In Image<k>` in the prompt")
    for number in sorted(numbers):
        if number < 1 or number > (num_images or number):
            limit = f"this record has Image1 to Image{num_images}" if num_images else "counting starts at 1"
            raise ValueError(f"Image{number} does not exist: {limit}")
    if len(numbers) > 1 and raw.get("target_box") is not None:
        raise ValueError(f"`target_box` is for one target, and this record has {image_names(numbers)}")
    return tuple(number - 1 for number in sorted(numbers))


def _is_search(raw: dict) -> bool:
    found = raw.get("is_search")
    if found is not None and not isinstance(found, bool):
        raise ValueError(f"`is_search` must be true or false, not {json.dumps(found)[:40]}")
    return found is True


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _derived(raw: dict, prompt: str, is_named: bool, num_images: int) -> str:
    """The format of a record that does not say it."""
    if num_images > 1:
        return "sequence"
    if is_named or raw.get("grid") is not None:
        return "collage"
    question = prompt.rpartition(IMAGE)[2].strip()
    return "pip" if raw.get("target_box") is not None or PIC_IN_PIC.match(question) else "single"


def _no_target(raw: dict, num_images: int) -> tuple[int, ...]:
    if num_images < 2:
        raise ValueError("a multi prompt has several images, this record lists 1: its image_type is `single`")
    given = [name for name in ("target", "targets", "target_box", "grid") if raw.get(name) is not None]
    given += ["is_search"] if raw.get("is_search") else []
    if given:
        raise ValueError(f"a multi prompt refers to no image, but the record has `{given[0]}`: is it a sequence?")
    return ()
