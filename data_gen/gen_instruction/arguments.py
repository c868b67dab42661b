"""Command lines: what both generators take, and what is checked before any work."""

import argparse
from pathlib import Path
from typing import Any

from data_gen.gen_instruction.workers import usable_cores


def add_common(parser: argparse.ArgumentParser) -> None:
    """Flags of instructions and test sets alike."""
    parser.add_argument("--source", nargs="+", required=True,
                        help="LLaVA-style JSON or JSONL, folder of datasets' save_to_disk, .parquet, or .csv with\n"
                             "image,question,answer[,id,subset]; several are put together")  # fmt: skip
    parser.add_argument("--image_folder", help="folder, .zip or .tar of the pictures, unless the source embeds them")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--num_workers", type=int, default=usable_cores(), help="processes (default: all cores)")
    parser.add_argument("--picture_format", choices=["jpg", "png"], default="jpg",
                        help="of collages and pictures in pictures: jpg of quality 95 (default), or png")  # fmt: skip


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
