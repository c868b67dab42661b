"""Command lines: what both generators take, and what is checked before any work."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_gen.gen_instruction.workers import usable_cores
from llava.command_line import flag


@dataclass(kw_only=True)
class Common:
    """Flags of instructions and test sets alike."""

    _argument_group_name = "sources and output"
    source: list[str] = flag(
        "LLaVA-style JSON or JSONL, folder of datasets' save_to_disk, .parquet, or .csv or .tsv with "
        "image,question,answer[,id,subset]; several are put together"
    )
    image_folder: str | None = flag("folder, .zip or .tar of the pictures, unless the source embeds them", None)
    output: Path = flag("folder to write")
    num_workers: int = flag("processes", usable_cores())
    picture_format: str = flag(
        "of collages and pictures in pictures: jpg of quality 95, or png", "jpg", choices=["jpg", "png"]
    )


def weights(text: str, allowed: dict[str, Any]) -> dict[Any, float]:
    """`2:3,4:1` as {2: 3.0, 4: 1.0}; choices that are not named get 0. `allowed` has the choices by name.

    Raises ValueError naming the valid choices.
    """
    example = ",".join(f"{name}:1" for name in list(allowed)[:2])
    found = dict.fromkeys(allowed.values(), 0.0)
    for part in text.split(","):
        name, _, value = part.partition(":")
        try:
            found[allowed[name.strip()]] = float(value)
        except (KeyError, ValueError) as error:
            choices = ", ".join(allowed)
            raise ValueError(f"weights {text!r}: {part!r} is none of {choices} with a number, as {example}") from error
    if not all(0 <= value < float("inf") for value in found.values()) or not sum(found.values()):
        raise ValueError(f"weights {text!r}: they must be positive numbers, or 0 for none, as {example}")
    return found


def weights_or(text: str | None, default: dict[Any, float]) -> dict[Any, float]:
    """The weights of a flag that may be left out; their choices are those of the default."""
    return default if text is None else weights(text, {str(choice): choice for choice in default})


def shown(shares: dict[Any, int]) -> str:
    """Weights as the flags take them."""
    return ",".join(f"{choice}:{weight}" for choice, weight in shares.items())
