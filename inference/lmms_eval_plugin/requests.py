"""What lmms-eval asks, in our words: pure functions that need no lmms-eval."""

from collections.abc import Mapping, Sequence
from typing import Any

from inference.llava_hound_dpo.interchange_formats import region_of
from llava.asked import named_in, what_is_asked
from llava.regions import collage_grid

DEFAULTS = {"max_new_tokens": 1024, "num_beams": 1}  # where a task does not say it, as in lmms-eval's own LLaVA
KNOWN = {"until", "max_new_tokens", "temperature", "top_p", "num_beams", "do_sample"}
MEASURES = (
    "attention_ratio", "attention_by_image", "image_type", "target", "targets", "grid", "confidence", "perplexity",
    "scale", "is_complete", "is_too_long",
)  # fmt: skip


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `ask` for a task's generation arguments: greedy unless there is a temperature and it may sample."""
    settings = {name: given.get(name) or default for name, default in DEFAULTS.items()}
    if given.get("temperature") and given.get("do_sample") is not False:
        settings |= {"temperature": given["temperature"], "top_p": given.get("top_p") or 1.0}
    return settings


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """The answer up to the first of the texts that a task ends answers at."""
    for end in [until] if isinstance(until, str) else until or ():
        text = text.partition(end)[0] if end else text
    return text.strip()


def region_fields(prompt: str, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """What a benchmark's prompt points at, as fields of a record; `sizes` are its pictures' (width, height) in px.

    Of several images as of imported sets, of one what its words say. A picture that shows no such cell as is named is
    pointed at as a whole: there are sets whose images come joined into one.
    """
    mentions = named_in(prompt)
    named = set().union(*mentions)
    if len(sizes) > 1 or named == {1}:
        return {"image_type": region_of(prompt, len(sizes))["image_type"], "points_elsewhere": False}
    rows, cols = collage_grid(sizes[0])
    if len(mentions) > 1 or max(named, default=0) > rows * cols:
        return {"image_type": "single", "points_elsewhere": True}
    return {"image_type": what_is_asked({}, [prompt], 1)[0], "points_elsewhere": False}


def measures_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is logged of an answer beside its text, as answers.jsonl calls it."""
    return {name: record[name] for name in MEASURES if record.get(name) is not None}
