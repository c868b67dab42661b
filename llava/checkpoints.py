"""Loading a LLaVA-1.5 checkpoint of any dialect: llava-hf, the original format, or a LoRA adapter on either.

Every tensor is accounted for. What is missing, unexpected or of another shape is an error with its name; nothing
starts from random numbers.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from llava import original
from llava.attention import install
from llava.conversation import END, IMAGE

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
# The seven linear layers of every block of the language model. A plain "q_proj" would also match the vision tower.
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
SAMPLED_BYTES = 1 << 20
PROJECTOR = "multi_modal_projector"
LLAVA_HF, ORIGINAL, PEFT_ADAPTER, ORIGINAL_LORA = "llava-hf", "original LLaVA", "PEFT adapter", "original LLaVA LoRA"


@dataclass(frozen=True)
class Source:
    """What a `--model_name_or_path` is."""

    path: str
    dialect: str  # one of the four above
    base: "Source | None" = None  # below an adapter
    image_tower: str | None = None  # overrides the vision tower that an original checkpoint names

    @property
    def root(self) -> "Source":
        """The checkpoint that holds the whole model."""
        return self.base.root if self.base else self

    def __str__(self) -> str:
        return f"{self.path} ({self.dialect})" + (f" on {self.base}" if self.base else "")


def find_source(path: str, image_tower: str | None = None) -> Source:
    """Dialect of a folder or hub name, by its files.

    Raises FileNotFoundError if there is nothing to read, ValueError if it is no LLaVA-1.5.
    """
    folder = Path(path)
    if (folder / ADAPTER_CONFIG).is_file():
        settings = _read_json(folder / ADAPTER_CONFIG)
        base = settings.get("base_model_name_or_path")
        if not base:
            raise ValueError(f"{path}: {ADAPTER_CONFIG} names no base model (base_model_name_or_path)")
        is_old = (folder / original.NON_LORA).is_file() or (folder / "config.json").is_file()
        return Source(path, ORIGINAL_LORA if is_old else PEFT_ADAPTER, find_source(base, image_tower))
    raw = _read_config(path)
    if raw.get("model_type") == "llava" and "text_config" not in raw and "hidden_size" not in raw:
        raise ValueError(f"{path}: config.json describes no language model (no `text_config`)")
    if original.is_original(raw):
        return Source(path, ORIGINAL, image_tower=image_tower)
    if raw.get("model_type") != "llava" or "text_config" not in raw:
        raise ValueError(f"{path}: config.json is of model_type {raw.get('model_type')!r}, not of a LLaVA-1.5")
    return Source(path, LLAVA_HF)


def load_config(path: str, image_tower: str | None = None) -> LlavaConfig:
    """The config of a checkpoint, or of the base below an adapter. Raises like `find_source`."""
    source = find_source(path, image_tower).root
    if source.dialect == ORIGINAL:
        try:
            config = original.translate_config(_read_config(source.path), source.image_tower)
        except ValueError as error:
            raise ValueError(f"{source.path}: {error}") from error
    else:
        config = LlavaConfig.from_pretrained(source.path)
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"{source.path}: vision_feature_select_strategy is {config.vision_feature_select_strategy!r}; regions need "
            "the patch tokens alone ('default'), as LLaVA-1.5 has them"
        )
    return config


def load_processor(path: str, image_tower: str | None = None):
    """Tokenizer and image processor. Raises ValueError if its special tokens are not the model's."""
    source = find_source(path, image_tower)
    config = load_config(path, image_tower)
    place = path if (Path(path) / "processor_config.json").is_file() else source.root.path
    if place == source.root.path and source.root.dialect == ORIGINAL:
        raw, folder = _read_config(place), original.local_folder(place)
        processor = original.build_processor(folder, raw, config, source.root.image_tower)
    else:
        try:
            processor = AutoProcessor.from_pretrained(place)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{place}: no processor to load ({_first_line(error)})") from error
    found = processor.tokenizer.convert_tokens_to_ids(IMAGE)
    if found != config.image_token_id:
        raise ValueError(
            f"{place}: the tokenizer reads {IMAGE} as id {found}, the model has id {config.image_token_id}"
        )
    if processor.tokenizer.eos_token != END:
        raise ValueError(f"{place}: the end token is {processor.tokenizer.eos_token!r}, vicuna_v1 ends with {END!r}")
    return processor


def load_model(
    path: str, dtype: torch.dtype = torch.float32, image_tower: str | None = None, **settings
) -> LlavaForConditionalGeneration | PeftModel:
    """The model with our attention function installed; with its adapter where `path` is one.

    `settings` go to transformers' `from_pretrained` (a quantisation). Raises ValueError naming missing, unexpected and
    mis-shaped tensors.
    """
    source = find_source(path, image_tower)
    model = _load_whole(source.root, load_config(path, image_tower), dtype, **settings)
    install(model)
    logger.info("loaded %s: %s parameters in %s", source, f"{model.num_parameters():,}", dtype)
    return _with_adapters(model, source)


def check_tensors(path: str, image_tower: str | None = None) -> int:
    """Number of tensors of a checkpoint, each accounted for by name and shape, without reading their numbers.

    Raises ValueError like `load_model`.
    """
    source = find_source(path, image_tower)
    model = _load_whole(source.root, load_config(path, image_tower), torch.float32, device_map="meta")
    adapted = _with_adapters(model, source)
    return len(adapted.state_dict())


def weight_digest(path: str) -> str:
    """Hash of what decides a checkpoint's weights and settings, of an adapter with its base.

    A file counts with its name, its size and its first and last mebibyte; a hub name with itself alone.
    """
    source, parts = find_source(path), []
    while source:
        files = [file for file in Path(source.path).glob("*") if file.suffix in (".safetensors", ".bin", ".json")]
        parts += [(file.name, file.stat().st_size, _ends(file)) for file in sorted(files)] or [source.path]
        source = source.base
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _ends(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(SAMPLED_BYTES)
        file.seek(max(0, path.stat().st_size - SAMPLED_BYTES))
        return hashlib.sha256(head + file.read()).hexdigest()


def image_tokens(config: LlavaConfig) -> int:
    """Image tokens per image: 576 for CLIP-L/336."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def _load_whole(source: Source, config: LlavaConfig, dtype: torch.dtype, **more) -> LlavaForConditionalGeneration:
    # Mis-shaped tensors are refused below, by name.
    settings = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True, **more}
    model_class = LlavaForConditionalGeneration
    try:
        if source.dialect == ORIGINAL:
            folder, raw = original.local_folder(source.path), _read_config(source.path)
            state = original.read_state(folder, raw, config, source.image_tower)
            account(source.path, shapes_of(config), {name: tensor.shape for name, tensor in state.items()})
            model, report = model_class.from_pretrained(None, config=config, state_dict=state, **settings)
            model.name_or_path = source.path
        else:
            model, report = model_class.from_pretrained(source.path, **settings)
    except (OSError, SafetensorError) as error:
        raise FileNotFoundError(f"{source.path}: the weights cannot be read ({_first_line(error)})") from error
    _refuse(source.path, *(report.get(kind, ()) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")))
    return model


def _with_adapters(model, source: Source):
    if source.base is None:
        return model
    model = _with_adapters(model, source.base)
    if source.dialect == ORIGINAL_LORA:
        return _load_original_lora(model, Path(source.path))
    return _load_peft(model, Path(source.path))


def _load_peft(model, folder: Path) -> PeftModel:
    """A PEFT adapter, checked: plain `PeftModel.from_pretrained` leaves a missing tensor at its random start."""
    adapted = get_peft_model(model, PeftConfig.from_pretrained(folder), autocast_adapter_dtype=False)
    given = original.read_tensors(folder, original.ADAPTER_FILES)
    wanted = get_peft_model_state_dict(adapted)
    account(str(folder), {n: t.shape for n, t in wanted.items()}, {n: t.shape for n, t in given.items()})
    if not next(model.parameters()).is_meta:
        set_peft_model_state_dict(adapted, given)
    return adapted


def _load_original_lora(model, folder: Path) -> PeftModel:
    """Base, then fully trained tensors, then LoRA, each checked by name and shape."""
    lora, trained = original.translate_lora(folder)
    own = dict(model.named_parameters())
    _refuse(
        str(folder),
        [],
        [n for n in trained if n not in own],
        [n for n in trained if n in own and own[n].shape != trained[n].shape],
    )
    with torch.no_grad():
        for name, tensor in trained.items():
            own[name].copy_(tensor)
    settings = _read_json(folder / ADAPTER_CONFIG)
    modules = sorted({name.rsplit(".lora_", 1)[0] for name in lora})
    config = LoraConfig(r=settings["r"], lora_alpha=settings["lora_alpha"], lora_dropout=0.0, target_modules=modules)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    wanted = {n: p for n, p in adapted.named_parameters() if ".lora_" in n}
    given = {f"base_model.model.{name.replace('.weight', '.default.weight')}": tensor for name, tensor in lora.items()}
    account(str(folder), {n: p.shape for n, p in wanted.items()}, {n: t.shape for n, t in given.items()})
    with torch.no_grad():
        for name, tensor in given.items():
            wanted[name].copy_(tensor)
    return adapted


def shapes_of(config: LlavaConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor that a model of this config loads."""
    with init_empty_weights():
        return {name: tensor.shape for name, tensor in LlavaForConditionalGeneration(config).state_dict().items()}


def account(where: str, wanted: Mapping[str, torch.Size], given: Mapping[str, torch.Size]) -> None:
    """Raises ValueError naming every tensor that is missing, unexpected, or of another shape."""
    _refuse(
        where,
        [name for name in wanted if name not in given],
        [name for name in given if name not in wanted],
        [
            f"{name} {tuple(given[name])}, the model has {tuple(wanted[name])}"
            for name in wanted
            if name in given and given[name] != wanted[name]
        ],
    )


def _refuse(where: str, missing: Iterable, unexpected: Iterable, mismatched: Iterable) -> None:
    problems = []
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", mismatched)):
        names = [_name(name) for name in names]
        if names:
            problems.append(f"{kind} tensors: {original.first_names(names)}")
    if problems:
        raise ValueError(f"{where}: the weights do not fit the config; {'; '.join(problems)}")


def _name(entry) -> str:
    """transformers reports a mis-shaped tensor as (name, shape in the file, shape in the model)."""
    if isinstance(entry, str):
        return entry
    name, found, wanted = entry
    return f"{name} {tuple(found)}, the model has {tuple(wanted)}"


def _read_config(path: str) -> dict:
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{path}: the folder has no config.json; is it a checkpoint?")
        return _read_json(folder / "config.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise FileNotFoundError(f"{path}: no such checkpoint folder, and not a hub name of the form owner/name")
    try:
        return LlavaConfig.get_config_dict(path)[0]
    except OSError as error:
        raise FileNotFoundError(
            f"{path}: not a folder here, and the hub gave no config ({_first_line(error)}); "
            "download the checkpoint and give its folder"
        ) from error


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON ({error})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
