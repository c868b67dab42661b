"""Tiny LLaVA-OneVision with SigLIP and Qwen2, with the chat template of the hub and that of its conversion script.

Tiles have 5 x 5 patches of 8 px and a rest of 4 px, as the real ones have 27 x 27 of 14 px and a rest of 6 px.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import avg_pool2d
from transformers import AutoConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from tests.tiny.common import byte_tokenizer, mean_light, peaky
from tests.tiny.common import write as write_files

KINDS = ("llava_onevision", "llava_onevision_converted")
CAP = 60  # tokens of a picture that some of its grids of tiles keep to
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
SIDE, PATCH, TILES = 44, 8, 6
NEWLINE = -1.0  # what `show_light` makes of a newline token: no picture is as dark


def chat_template(after_role: str, after_image: str, before_text: str, after_turn: str, kinds) -> str:
    """ChatML as LLaVA's successors have it: all pictures of a message first, nothing of a message that is a string."""
    loop = "{% for part in message['content'] | selectattr('type', 'equalto', 'KIND') %}"
    pictures = "".join(loop.replace("KIND", kind) + f"<{kind}>{after_image}" + "{% endfor %}" for kind in kinds)
    words, text = loop.replace("KIND", "text"), f"{{{{ '{before_text}' + part['text'] }}}}"
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '" + after_role + "' }}" + pictures
        + "{% if message['role'] != 'assistant' %}" + words + text + "{% endfor %}{% else %}"
        + words + "{% generation %}" + text + "{% endgeneration %}{% endfor %}{% endif %}{{ '<|im_end|>" + after_turn
        + "' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )  # fmt: skip


TEMPLATES = {
    "llava_onevision": chat_template(" ", "", "\\n", "", ("image", "video")),
    "llava_onevision_converted": chat_template("\\n", "{{ '\\n' }}", "", "\\n", ("image", "video")),
}


def write(folder: Path, kind: str) -> None:
    """A checkpoint of one of `KINDS`."""
    tokenizer = byte_tokenizer(SPECIALS, TEMPLATES[kind], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    grids = [[SIDE * down, SIDE * across] for down in range(1, TILES + 1) for across in range(1, TILES + 1)]
    pictures = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=grids, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    model = peaky(config(tokenizer, "llava_onevision", image_grid_pinpoints=grids))
    write_files(folder, model, tokenizer, pictures, "LlavaOnevisionProcessor")
    settings = {
        "processor_class": "LlavaOnevisionProcessor", "image_token": "<image>", "video_token": "<video>",
        "num_image_tokens": (SIDE // PATCH) ** 2, "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    }  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    name_as_hub(folder)


def name_as_hub(folder: Path) -> None:
    """Give the tower's tensors the names that the hub has and transformers no longer writes."""
    tensors = load_file(folder / "model.safetensors")
    tower = {name: name.replace("vision_tower.", "vision_tower.vision_model.") for name in tensors}
    save_file({tower[name]: tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def config(tokenizer, model_type: str, **more):
    """Of a SigLIP below a Qwen2 with grouped heads; all patches of the tower's last block are image tokens."""
    ids = {f"{kind}_token_index": tokenizer.convert_tokens_to_ids(f"<{kind}>") for kind in ("image", "video")}
    text = {
        "model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH, "vision_use_head": False,
    }  # fmt: skip
    return AutoConfig.for_model(
        model_type, text_config=text, vision_config=vision, vision_feature_select_strategy="full",
        vision_feature_layer=-1, tie_word_embeddings=False, **ids, **more,
    )  # fmt: skip


def show_light(model, family) -> None:
    """Let the tower hand on, in every channel of a token, the mean brightness of its pixels; newlines are `NEWLINE`.

    Only what a patch is made into is replaced: tiles are put together, unpadded and interpolated by the model.
    """
    pictures, inner = family.image_processor, model.model

    def forward(pixel_values, **_):
        mean, std = pictures.image_mean, pictures.image_std
        rows = pixel_values.shape[-1] // PATCH
        patches = avg_pool2d(pixel_values, PATCH).flatten(2)  # the rest at right and below is left out, as by the tower
        patches = patches.transpose(1, 2).flatten(0, 1)
        light = mean_light(patches, mean, std).view(-1, rows**2, 1)
        return BaseModelOutputWithPooling(hidden_states=(light.expand(-1, -1, 64),))

    inner.vision_tower.forward = forward
    inner.multi_modal_projector.forward = lambda features: features
    if hasattr(inner, "image_newline"):
        torch.nn.init.constant_(inner.image_newline, NEWLINE)
