"""The model families, one file each; `find_family` picks the one of a config."""

from collections.abc import Mapping
from typing import Any

from llava.families.family import Family, ImageTokens, model_inputs, position_ids
from llava.families.idefics3 import Idefics3
from llava.families.internvl import InternVL
from llava.families.llava15 import Llava15
from llava.families.llava_interleave import LlavaInterleave
from llava.families.llava_onevision import LlavaOneVision
from llava.families.qwen_vl import QwenVL

__all__ = [
    "FAMILIES", "Family", "ImageTokens", "Llava15", "QwenVL", "find_family", "model_inputs", "position_ids",
    "refuse_unknown",
]  # fmt: skip

# Of two of one model_type the first that fits.
FAMILIES: tuple[type[Family], ...] = (LlavaInterleave, Llava15, QwenVL, LlavaOneVision, InternVL, Idefics3)

# What people will try that cannot work here, and why.
REFUSED = {
    "qwen3_5": "layers of linear attention carry state from one answer of a packed row into the next",
    "qwen3_5_moe": "layers of linear attention carry state from one answer of a packed row into the next",
    "internvl_chat": "that layout runs code of its own; take the converted one, whose name ends in -hf",
    "mllama": "pictures are read by cross-attention: no token of the prompt stands for them",
    "gemma3": "images see themselves both ways and most layers slide, which packed rows do not",
    "paligemma": "the prompt is seen both ways, which packed rows do not",
}


def find_family(config: Any) -> type[Family]:
    """The family of a config. Raises ValueError listing those that are known."""
    refuse_unknown({"model_type": config.model_type})
    return next(f for f in FAMILIES if config.model_type in f.model_types and f.fits(config))


def refuse_unknown(raw: Mapping[str, Any]) -> None:
    """Raises ValueError for a config.json of no family that is known, listing these."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str | None):
        raise ValueError(f"config.json is of model_type {model_type!r}: a name is due")
    if any(model_type in family.model_types for family in FAMILIES):
        return
    if model_type in REFUSED:
        raise ValueError(f"models of type {model_type} are not supported: {REFUSED[model_type]}")
    known = ", ".join(f"{family.name} ({', '.join(family.model_types)})" for family in FAMILIES)
    raise ValueError(f"config.json is of model_type {model_type!r}, which is none of: {known}")
