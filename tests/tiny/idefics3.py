"""Tiny Idefics3 and SmolVLM."""

import json
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.tiny.common import byte_tokenizer, peaky, template
from tests.tiny.common import write as write_files

KINDS = ("idefics3", "smolvlm")
OURS = ("tiles",)  # of the pixels: what transformers' processor does not give
PICTURE = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
TILES = tuple(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7))
SPECIALS = {  # of LLaMA 3 and of SmolLM2; the first begins a text, the second pads
    "idefics3": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "smolvlm": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
}
# Px of a tile and of a patch, patches that the connector joins: as Idefics3-8B, whose patches fill a tile, and as
# SmolVLM2-2.2B, whose patches do not (27 of 14 px in 384).
GEOMETRY = {"idefics3": (56, 14, 2), "smolvlm": (64, 10, 3)}
PROCESSORS = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}


def write(folder: Path, kind: str) -> None:
    """A checkpoint of one of `KINDS`."""
    begin, pad = SPECIALS[kind][:2]
    roles = {"bos_token": begin, "eos_token": "<end_of_utterance>", "pad_token": pad}
    tokenizer = byte_tokenizer((*SPECIALS[kind], *PICTURE, *TILES), template(kind), **roles)
    if kind == "idefics3":  # LLaMA 3's tokenizer begins every text
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
        )
    side, patch, scale = GEOMETRY[kind]
    pictures = PROCESSORS[kind](size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side})
    name = {"idefics3": "Idefics3Processor", "smolvlm": "SmolVLMProcessor"}[kind]
    write_files(folder, peaky(config(tokenizer, kind)), tokenizer, pictures, name)
    settings = {"processor_class": name, "image_seq_len": (side // patch // scale) ** 2}
    (folder / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")


def config(tokenizer, kind: str):
    """Of a model with grouped heads, whose last layers see what the first do not."""
    side, patch, scale = GEOMETRY[kind]
    text = {
        "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 4096, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": side, "patch_size": patch,
    }  # fmt: skip
    return AutoConfig.for_model(
        kind, text_config=text, vision_config=vision, scale_factor=scale, tie_word_embeddings=False,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def show_light(model, family) -> None:
    """Let the tower hand on, in every channel of a patch, its mean brightness; the connector then takes the mean.

    Pixel shuffle and the order of tiles stay the model's own.
    """
    pictures, vision = family.image_processor, model.config.vision_config

    def forward(pixel_values, patch_attention_mask, **_):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (pictures.image_mean, pictures.image_std))
        light = (pixel_values * std + mean).mean(dim=1, keepdim=True)
        patches = torch.nn.functional.avg_pool2d(light, vision.patch_size).flatten(1)
        return BaseModelOutputWithPooling(last_hidden_state=patches[..., None].repeat(1, 1, vision.hidden_size))

    model.model.vision_model.forward = forward
    projection = model.model.connector.modality_projection.proj.weight
    projection.data.fill_(1 / projection.shape[1])
