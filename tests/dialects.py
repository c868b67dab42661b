"""One random tiny model written in every checkpoint format that we claim to read."""

import json
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from llava.families.llava15 import Llava15
from llava.families.llava15_original import build_tokenizer, pad_rows
from scripts.miniature.model import world_text

SIDE, PATCH, WIDTH, LAYERS = 28, 7, 32, 3
PIECES = 400


@dataclass(frozen=True)
class Formats:
    """Folders of the same model."""

    llava_hf: Path
    original: Path  # safetensors, sharded
    original_bin: Path  # .bin, sharded
    tower: Path
    adapter: Path  # PEFT, on llava_hf
    original_lora: Path  # original LoRA folder with non_lora_trainables.bin, on original
    pieces: Path  # tokenizer.model


def make_formats(folder: Path) -> Formats:
    """Write all of them below `folder`."""
    formats = Formats(
        *(folder / n for n in ("hf", "orig", "orig_bin", "clip", "adapter", "orig_lora", "tokenizer.model"))
    )
    train_sentencepiece(formats.pieces)
    model = make_model()
    write_tower(model, formats.tower)
    tensors = original_tensors(model)
    for place, kind in ((formats.original, "safetensors"), (formats.original_bin, "bin")):
        write_original(place, tensors, model, formats, kind)
    write_llava_hf(model, formats)
    write_adapters(formats)
    return formats


def train_sentencepiece(path: Path) -> None:
    """A small BPE with byte fallback and LLaMA's special ids."""
    text = path.with_suffix(".txt")
    text.write_text("\n".join(world_text() * 3 + ["def f(x):", "    return  x", "Ünïcode 12345 ."]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(path.with_suffix("")), vocab_size=PIECES, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, split_digits=True, add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, normalization_rule_name="identity", character_coverage=0.99995,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip


def num_pieces(path: Path) -> int:
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()


def make_model(pieces: int = PIECES) -> LlavaForConditionalGeneration:
    """The model all formats hold; its vocabulary is padded as our reader pads an original one."""
    rows = -(-(pieces + 1) // 64) * 64
    vision = dict(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE)
    text = dict(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=rows
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, patch_size=PATCH, projection_dim=WIDTH),
        text_config={"model_type": "llama", **text, "rms_norm_eps": 1e-5, "max_position_embeddings": 512},
        image_token_index=pieces, image_seq_length=16, projector_hidden_act="gelu", vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
            weight.copy_(pad_rows(weight[:pieces], rows))
    return model


def original_tensors(model) -> dict[str, torch.Tensor]:
    """Names and vocabulary of liuhaotian/llava-v1.5, written down here independently of the reader."""
    renamed = {}
    for name, tensor in model.state_dict().items():
        if "vision_tower" in name:
            continue
        name = name.replace("model.multi_modal_projector.linear_1", "model.mm_projector.0")
        name = name.replace("model.multi_modal_projector.linear_2", "model.mm_projector.2")
        name = name.replace("model.language_model.", "model.")
        if "embed_tokens" in name or "lm_head" in name:
            tensor = tensor[: model.config.image_token_id]
        renamed[name] = tensor.clone()
    for layer in range(LAYERS):
        renamed[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return renamed


def write_original(folder: Path, tensors: dict, model, formats: Formats, kind: str) -> None:
    folder.mkdir()
    text = model.config.text_config
    config = {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava" if kind == "bin" else "llava_llama",
        "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 4, "rms_norm_eps": text.rms_norm_eps, "max_position_embeddings": 512,
        "hidden_act": "silu",
        "vocab_size": model.config.image_token_id, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "mm_vision_tower": str(formats.tower), "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_hidden_size": WIDTH, "image_aspect_ratio": "pad",
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(formats.pieces.read_bytes())
    names = sorted(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    stem, end = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    weight_map = {}
    for number, half in enumerate(halves, 1):
        shard = f"{stem}-{number:05d}-of-00002.{end}"
        part = {name: tensors[name] for name in half}
        save_file(part, folder / shard) if kind == "safetensors" else torch.save(part, folder / shard)
        weight_map |= dict.fromkeys(half, shard)
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_tower(model, folder: Path) -> None:
    tower = CLIPVisionModel(model.config.vision_config)
    tower.load_state_dict(model.model.vision_tower.state_dict())
    tower.save_pretrained(folder)
    image_processor().save_pretrained(folder)


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


def write_llava_hf(model, formats: Formats) -> None:
    model.save_pretrained(formats.llava_hf)
    tokenizer = build_tokenizer(formats.original, model.config.image_token_id)
    LlavaProcessor(
        image_processor=image_processor(), tokenizer=tokenizer, patch_size=PATCH, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    ).save_pretrained(formats.llava_hf)  # fmt: skip


def write_adapters(formats: Formats) -> None:
    """The same random LoRA and the same changed projector as a PEFT adapter and as an original LoRA folder."""
    from peft import LoraConfig, get_peft_model

    model = LlavaForConditionalGeneration.from_pretrained(formats.llava_hf)
    adapted = get_peft_model(
        model,
        LoraConfig(r=2, lora_alpha=4, target_modules=Llava15.lora_targets(), modules_to_save=[*Llava15.projectors]),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(formats.adapter)
    formats.original_lora.mkdir()
    lora, trained = {}, {}
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            bare = name.replace("model.language_model.", "model.").replace(".default.weight", ".weight")
            lora[bare] = parameter.detach().clone()
        elif "modules_to_save" in name:
            layer = "0" if "linear_1" in name else "2"
            trained[f"base_model.model.model.mm_projector.{layer}.{name.rsplit('.', 1)[1]}"] = (
                parameter.detach().clone()
            )
    torch.save(lora, formats.original_lora / "adapter_model.bin")
    torch.save(trained, formats.original_lora / "non_lora_trainables.bin")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {
        "base_model_name_or_path": str(formats.original),
        "r": 2,
        "lora_alpha": 4,
        "target_modules": targets,
        "peft_type": "LORA",
    }
    (formats.original_lora / "adapter_config.json").write_text(json.dumps(settings))
    (formats.original_lora / "config.json").write_bytes((formats.original / "config.json").read_bytes())
