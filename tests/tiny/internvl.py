"""Tiny InternVL on Qwen2 (InternVL 2.5 and 3), Qwen3 (3.5) and LLaMA (2.5, whose InternLM2 is one)."""

import json
from pathlib import Path

import torch
from tokenizers import processors
from transformers import AutoConfig
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.modeling_internvl import InternVLVisionModelOutputWithPooling

from tests.tiny.common import byte_tokenizer, mean_light, peaky
from tests.tiny.common import write as write_files

KINDS = ("internvl_qwen2", "internvl_qwen3", "internvl_llama")
TEXT = {"internvl_qwen2": "qwen2", "internvl_qwen3": "qwen3", "internvl_llama": "llama"}
SIDE, PATCH, RATIO = 56, 14, 0.5  # px of a tile and of a patch; published: 448
PICTURES = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<video>")
SPECIALS = {
    "qwen": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *PICTURES),
    "llama": ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *PICTURES),
}
ROLES = {
    "qwen": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"},
}
# What InternVL's processor asks its tokenizer for.
NAMED = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}  # fmt: skip
# ChatML, as published: a part that is a picture brings a line break.
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


def write(folder: Path, kind: str) -> None:
    """A checkpoint of one of `KINDS`. On LLaMA the tokenizer's end token is `</s>`, the template's `<|im_end|>`."""
    sort = "llama" if TEXT[kind] == "llama" else "qwen"
    tokenizer = byte_tokenizer(SPECIALS[sort], TEMPLATE, extra_special_tokens=NAMED, **ROLES[sort])
    if sort == "llama":
        start = [("<s>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=start
        )
    pictures = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    write_files(folder, peaky(config(tokenizer, kind)), tokenizer, pictures, "InternVLProcessor")
    settings = {"processor_class": "InternVLProcessor", "image_seq_length": int(SIDE // PATCH * RATIO) ** 2}
    (Path(folder) / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")


def config(tokenizer, kind: str):
    """Of a model with grouped heads."""
    text = {
        "model_type": TEXT[kind], "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None,
        "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 2, "attention_bias": True,
    }  # fmt: skip
    return AutoConfig.for_model(
        "internvl", text_config=text, vision_config=vision, downsample_ratio=RATIO, tie_word_embeddings=False,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=int(SIDE // PATCH * RATIO) ** 2,
    )  # fmt: skip


def show_light(model, family) -> None:
    """Let an image token have, in every channel, the mean brightness of the pixels it stands for.

    The tower hands on that of each patch; which of them an image token is made of is left to the model.
    """
    pictures, vision, projector = family.image_processor, model.config.vision_config, model.model.multi_modal_projector

    def tower(pixel_values, **_):
        (side, _), (patch, _) = vision.image_size, vision.patch_size
        cells = pixel_values.unfold(2, patch, patch).unfold(3, patch, patch)  # tiles, 3, rows, cols, patch, patch
        cells = cells.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, patch, patch)
        light = mean_light(cells, pictures.image_mean, pictures.image_std).view(-1, (side // patch) ** 2)
        light = torch.cat([torch.full_like(light[:, :1], 9.0), light], dim=1)  # the class token is no brightness
        light = light[..., None].repeat(1, 1, vision.hidden_size)
        return InternVLVisionModelOutputWithPooling(last_hidden_state=light)

    model.model.vision_tower.forward = tower
    projector.forward = lambda found: found.mean(dim=-1, keepdim=True).expand(-1, -1, projector.linear_2.out_features)
