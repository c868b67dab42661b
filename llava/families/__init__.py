"""The model families, one file each; `find_family` picks the one of a config."""

from llava.families.family import Family, ImageTokens
from llava.families.llava15 import Llava15

__all__ = ["FAMILIES", "Family", "ImageTokens", "find_family"]

FAMILIES: tuple[type[Family], ...] = (Llava15,)


def find_family(model_type: str | None) -> type[Family]:
    """The family of a config's `model_type`. Raises ValueError listing those that are known."""
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(f"{family.name} ({family.model_type})" for family in FAMILIES)
    raise ValueError(f"config.json is of model_type {model_type!r}, which is none of: {known}")
