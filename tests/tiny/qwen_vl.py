"""Tiny Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3-VL-MoE."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.tiny.common import byte_tokenizer, peaky, template
from tests.tiny.common import write as write_files

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
VISION = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 64},
    "qwen2_5_vl": {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
                   "window_size": 112, "fullatt_block_indexes": [1]},
    "qwen3_vl": {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
                 "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], "patch_size": 16},
}  # fmt: skip
PROCESSORS = {
    "qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor",
    "qwen3_vl_moe": "Qwen3VLProcessor",
}  # fmt: skip
VISION["qwen3_vl_moe"] = VISION["qwen3_vl"]


def write(folder: Path, kind: str) -> None:
    """A checkpoint of one of `KINDS`. The older ones' settings are those of the hub: numbers of px by older names."""
    is_third = kind.startswith("qwen3")
    tokenizer = byte_tokenizer(
        SPECIALS, template("qwen3_vl" if is_third else "qwen2_5_vl"), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    pictures = Qwen2VLImageProcessorPil(
        patch_size=16 if is_third else 14, merge_size=2, size={"shortest_edge": 4 * 28**2, "longest_edge": 1280 * 28**2}
    )
    model, name = peaky(config(tokenizer, kind)), PROCESSORS[kind]
    if is_third:
        write_files(folder, model, tokenizer, pictures, name)
        settings = {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": name, "patch_size": 16}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return
    model.generation_config.repetition_penalty = 1.05
    pixels = {"min_pixels": pictures.size["shortest_edge"], "max_pixels": pictures.size["longest_edge"]}
    write_files(folder, model, tokenizer, pictures, name, size=None, **pixels)


def config(tokenizer, kind: str):
    """Of a model with grouped heads, whose last layers see what the first do not."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    images = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None,
    }  # fmt: skip
    if kind == "qwen3_vl_moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return AutoConfig.for_model(
        kind, text_config=text, vision_config=VISION[kind], tie_word_embeddings=False, **images,
        **{f"{name}_token_id": value for name, value in ids.items()},
    )  # fmt: skip


def show_light(model, family) -> None:
    """Let the tower hand on, in every channel of an image token, the mean brightness of the pixels it stands for.

    Patches come merge cell by merge cell, which is how the merger takes them.
    """
    merge, visual = model.config.vision_config.spatial_merge_size, model.model.visual
    pictures = family.image_processor

    def forward(pixel_values, grid_thw, **_):
        patches = pixel_values.view(len(pixel_values), 3, -1)
        shown = patches * torch.tensor(pictures.image_std)[:, None] + torch.tensor(pictures.image_mean)[:, None]
        light = shown.mean(dim=(1, 2)).view(-1, merge**2).mean(dim=1, keepdim=True).expand(-1, 64)
        return visual_output(visual, light)

    visual.forward = forward


def visual_output(visual, light):
    """As the tower's own class of output."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    if "deepstack" in type(visual).__name__.lower() or hasattr(visual, "deepstack_merger_list"):
        return BaseModelOutputWithDeepstackFeatures(pooler_output=light, deepstack_features=[light, light])
    return BaseModelOutputWithPooling(pooler_output=light)
