"""A tiny Qwen2.5-VL for the miniature world: windows and a whole look in the tower, positions on three axes, ChatML."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from llava.families.qwen_vl import QwenVL
from scripts.miniature.model import (
    MAX_POSITIONS,
    PATCH_SIDE,
    PROJECTOR_SCALE,
    TEXT_WIDTH,
    VISION_WIDTH,
    spread,
    world_text,
)

MERGE = 2  # patches along a cell, which is one image token of PATCH_SIDE px
TOKENS = (4, 256)  # that a picture may cost; one of 72 px costs 36
SYSTEM = "You are a helpful assistant."
SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + QwenVL.placeholder + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FEATURES_WIDTH = TEXT_WIDTH  # of what `features` gives


def build(seed: int) -> tuple[Qwen2_5_VLForConditionalGeneration, QwenVL]:
    """An untrained Qwen2.5-VL of about 1.5 M parameters, and its family."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(build_config(tokenizer))
    spread(model.model.language_model)
    model.model.visual.merger.mlp[2].weight.data.mul_(PROJECTOR_SCALE)
    ids = {name: getattr(model.config.text_config, name) for name in ("bos_token_id", "eos_token_id")}
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=tokenizer.pad_token_id, **ids)
    return model, QwenVL(model.config, tokenizer, build_image_processor())


def features(model: Qwen2_5_VLForConditionalGeneration, pixels: Mapping[str, Tensor]) -> Tensor:
    """(cells of all pictures, FEATURES_WIDTH) image tokens, magnified: they stay at the scale of word embeddings."""
    return torch.cat(model.get_image_features(**pixels, return_dict=True).pooler_output) / PROJECTOR_SCALE


def save(family: QwenVL, folder: Path) -> None:
    """Write tokenizer, chat template and pictures' settings."""
    family.tokenizer.save_pretrained(folder)
    family.image_processor.save_pretrained(folder)


def build_tokenizer(more: Sequence[str] = ()) -> Qwen2Tokenizer:
    """A byte-level BPE by Qwen's rules, with a word a token for the world's own text and for `more`."""
    text = [*world_text((SYSTEM, "system\n", "user\n", "assistant\n", " what")), *more]
    learnt = Qwen2Tokenizer().train_new_from_iterator(
        text, vocab_size=10_000, new_special_tokens=list(SPECIALS[1:]), show_progress=False
    )
    learnt.eos_token, learnt.pad_token = "<|im_end|>", "<|endoftext|>"
    learnt.model_max_length, learnt.chat_template = MAX_POSITIONS, CHAT_TEMPLATE
    return learnt


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Pictures of any size in cells of PATCH_SIDE px, as many as TOKENS allow."""
    least, most = (number * PATCH_SIDE**2 for number in TOKENS)
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIDE // MERGE, merge_size=MERGE, size={"shortest_edge": least, "longest_edge": most}
    )


def build_config(
    tokenizer: Qwen2Tokenizer, text: Mapping[str, Any] | None = None, vision: Mapping[str, Any] | None = None
) -> Qwen2_5_VLConfig:
    """Sizes as the tiny LLaVA's, but for grouped heads; windows are as large as a collage's cell.

    Settings of both parts in `text` and `vision` go first.
    """
    ids = dict(zip(SPECIALS, tokenizer.convert_tokens_to_ids(list(SPECIALS)), strict=True))
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 4, "hidden_size": VISION_WIDTH, "intermediate_size": 192, "num_heads": 4,
            "patch_size": PATCH_SIDE // MERGE, "spatial_merge_size": MERGE, "window_size": 3 * PATCH_SIDE,
            "fullatt_block_indexes": [1, 2, 3], "out_hidden_size": TEXT_WIDTH, **(vision or {}),
        },
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": TEXT_WIDTH, "intermediate_size": 384, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": MAX_POSITIONS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"], "pad_token_id": None,
            **(text or {}),
        },
        **{f"{name}_token_id": ids[f"<|{name}|>"] for name in ("vision_start", "vision_end")},
        **{f"{name}_token_id": ids[f"<|{name}_pad|>"] for name in ("image", "video")},
        tie_word_embeddings=False,
    )  # fmt: skip
