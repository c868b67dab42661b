"""Which image a prompt is about: its format and target, said by a record's fields or by the prompt's words."""

import json
import re
from collections.abc import Sequence

FORMATS = ("sequence", "collage", "pip", "single", "multi")
IMAGE = "<image>"  # stands in a prompt for each picture
TARGET = re.compile(r"\bin\s+image\s*(\d+)", re.IGNORECASE)  # how a prompt names the image that it asks about
# How it names the inner picture of a pic-in-pic: in a phrase before the first comma.
PICTURE = r"(?:image|picture|photo|photograph|plot|subplot|figure|scene|shot)"
CENTRE = r"(?:cent(?:re|er|ral)|middle|inner|inset|embedded|smaller|inside the other|surrounded by|on top)"
PIC_IN_PIC = re.compile(rf"(?=[^,]*\b{CENTRE}\b)(?:[^,.?!]*\b{PICTURE}\b[^,.?!]*|(?:in|at) the \w+),", re.IGNORECASE)


def placeholders(image_type: str, num_pictures: int) -> str:
    """What stands before the question: of several pictures a numbered line for each."""
    if image_type not in ("sequence", "multi"):
        return f"{IMAGE}\n"
    return "".join(f"Image{number}:{IMAGE}\n" for number in range(1, num_pictures + 1))


def what_is_asked(raw: dict, asked: Sequence[str], num_images: int) -> tuple[str, int | None]:
    """Format and 0-based target: from the record's fields, else from the prompt, the last of the turns `asked`.

    `multi`, several images and no referred one, is never derived: a forgotten reference must not pass for it. Raises
    ValueError where they contradict each other, unless the record says that it `points_elsewhere`.
    """
    named = next(filter(None, ({int(k) for k in TARGET.findall(text)} for text in reversed(asked))), set())
    image_type, target = raw.get("image_type"), raw.get("target")
    if image_type is None:
        image_type = _derived(raw, asked[-1], bool(named), num_images)
    if target is not None and (not isinstance(target, int) or isinstance(target, bool)):
        raise ValueError(f"`target` must be a whole number from 1, not {json.dumps(target)[:40]}")
    if image_type not in FORMATS:
        raise ValueError(f"image_type {image_type!r} is none of {', '.join(FORMATS)}")
    if image_type == "multi":
        return image_type, _no_target(raw, num_images)
    if image_type != "sequence" and num_images != 1:
        raise ValueError(f"a {image_type} prompt has one image, this record lists {num_images}")
    is_whole, elsewhere = image_type in ("pip", "single"), raw.get("points_elsewhere") is True
    if target is None and len(named) > 1 and not (is_whole and elsewhere):
        raise ValueError(f"the prompt names {_names(named)}: which one is meant? Give `target` (1-based)")
    if target is not None and named and target not in named and not elsewhere:
        raise ValueError(f"`target` is {target!r}, but the prompt names {_names(named)}")
    if is_whole:
        if named - {1} and not elsewhere:
            raise ValueError(f"the prompt names {_names(named)}, but a {image_type} prompt has one image and no cells")
        return image_type, 0
    target = min(named, default=None) if target is None else target
    if target is None:
        raise ValueError("which image is meant? Give `target` (1-based), or write `In Image<k>` in the prompt")
    if target < 1 or (image_type == "sequence" and target > num_images):
        limit = f"this record has Image1 to Image{num_images}" if image_type == "sequence" else "counting starts at 1"
        raise ValueError(f"Image{target} does not exist: {limit}")
    return image_type, target - 1


def _derived(raw: dict, prompt: str, is_named: bool, num_images: int) -> str:
    """The format of a record that does not say it."""
    if num_images > 1:
        return "sequence"
    if is_named or raw.get("grid") is not None:
        return "collage"
    question = prompt.rpartition(IMAGE)[2].strip()
    return "pip" if raw.get("target_box") is not None or PIC_IN_PIC.match(question) else "single"


def _names(named: set[int]) -> str:
    return " and ".join(f"Image{k}" for k in sorted(named))


def _no_target(raw: dict, num_images: int) -> None:
    if num_images < 2:
        raise ValueError("a multi prompt has several images, this record lists 1: its image_type is `single`")
    given = [name for name in ("target", "target_box", "grid") if raw.get(name) is not None]
    if given:
        raise ValueError(f"a multi prompt refers to no image, but the record has `{given[0]}`: is it a sequence?")
