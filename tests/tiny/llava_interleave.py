"""Tiny LLaVA-NeXT-Interleave: the model type of LLaVA-1.5 with SigLIP and Qwen."""

import json
from pathlib import Path

from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.tiny.common import byte_tokenizer, peaky
from tests.tiny.common import write as write_files
from tests.tiny.llava_onevision import PATCH, SIDE, SPECIALS, chat_template, config, name_as_hub, show_light

__all__ = ["KINDS", "show_light", "write"]

KINDS = ("llava_interleave",)


def write(folder: Path, kind: str) -> None:
    """A checkpoint of one of `KINDS`."""
    template = chat_template(" ", "", "\\n", "", ("image",))
    tokenizer = byte_tokenizer(SPECIALS[:-1], template, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    pictures = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    write_files(folder, peaky(config(tokenizer, "llava")), tokenizer, pictures, "LlavaProcessor")
    settings = {
        "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": PATCH,
        "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0,
    }  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    name_as_hub(folder)
