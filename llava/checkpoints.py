"""Loading a LLaVA-1.5 checkpoint: its config, its processor, its weights, with or without a LoRA adapter."""

import json
import logging
import re
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from llava.attention import install
from llava.conversation import END, IMAGE

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
# The seven linear layers of every block of the language model. A plain "q_proj" would also match the vision tower.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
PROJECTOR = "multi_modal_projector"


def load_config(path: str) -> LlavaConfig:
    """The config of a llava-hf folder or hub name, or of the base below a LoRA adapter.

    Raises FileNotFoundError if there is nothing to read, ValueError if it is not a LLaVA-1.5 of the llava-hf format.
    """
    path = base_of(path)
    raw = _read_config(path)
    if "mm_vision_tower" in raw or raw.get("model_type") not in ("llava", None):
        raise ValueError(
            f"{path}: model_type {raw.get('model_type')!r} in the original LLaVA format or of another model; "
            "give a llava-hf checkpoint such as llava-hf/llava-1.5-7b-hf"
        )
    if "text_config" not in raw:
        raise ValueError(f"{path}: config.json has no `text_config`: not a llava-hf checkpoint")
    config = LlavaConfig.from_pretrained(path)
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"{path}: vision_feature_select_strategy is {config.vision_feature_select_strategy!r}; regions need the "
            "patch tokens alone ('default'), as LLaVA-1.5 has them"
        )
    return config


def load_processor(path: str):
    """Tokenizer and image processor. Raises ValueError if its special tokens are not the model's."""
    source = path if _has_file(path, "tokenizer_config.json") else base_of(path)
    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{source}: no processor to load ({_first_line(error)})") from error
    tokenizer = processor.tokenizer
    wanted = load_config(path).image_token_id
    found = tokenizer.convert_tokens_to_ids(IMAGE)
    if found != wanted:
        raise ValueError(f"{source}: the tokenizer reads {IMAGE} as id {found}, the model's config says {wanted}")
    if tokenizer.eos_token != END:
        raise ValueError(f"{source}: the end token is {tokenizer.eos_token!r}, vicuna_v1 ends answers with {END!r}")
    return processor


def load_model(path: str, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration | PeftModel:
    """The model with our attention function installed; with its adapter where `path` is a LoRA folder.

    Every tensor must come from the checkpoint: raises ValueError naming missing, unexpected and mis-shaped ones.
    """
    base = base_of(path)
    load_config(path)
    model, report = LlavaForConditionalGeneration.from_pretrained(base, dtype=dtype, output_loading_info=True)
    _refuse_incomplete(base, report)
    install(model)
    logger.info("loaded %s: %s parameters in %s", base, f"{model.num_parameters():,}", dtype)
    if base == path:
        return model
    logger.info("adapter: %s", path)
    return PeftModel.from_pretrained(model, path)


def base_of(path: str) -> str:
    """The checkpoint below a LoRA adapter, or the path itself if it is none."""
    adapter = Path(path) / ADAPTER_CONFIG
    if not adapter.is_file():
        return path
    return json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]


def image_tokens(config: LlavaConfig) -> int:
    """Image tokens per image: 576 for CLIP-L/336."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def _read_config(path: str) -> dict:
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{path}: the folder has no config.json; is it a checkpoint?")
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise FileNotFoundError(f"{path}: no such checkpoint folder, and not a hub name of the form owner/name")
    try:
        return LlavaConfig.get_config_dict(path)[0]
    except OSError as error:
        raise FileNotFoundError(
            f"{path}: not a folder here, and the hub gave no config ({_first_line(error)}); "
            "download the checkpoint and give its folder"
        ) from error


def _has_file(path: str, name: str) -> bool:
    return (Path(path) / name).is_file()


def _refuse_incomplete(path: str, report: dict) -> None:
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report.get(kind, ()))
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{kind.replace('_keys', '')} tensors: {', '.join(names[:5])}{more}")
    if problems:
        raise ValueError(f"{path}: the weights do not fit the config; {'; '.join(problems)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
