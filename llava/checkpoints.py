"""A checkpoint of any dialect, opened once: llava-hf, the original LLaVA format, or a LoRA adapter on either.

Every tensor is accounted for. What is missing, unexpected or of another shape is an error with its name; nothing
starts from random numbers.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

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
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig

from llava.attention import install
from llava.families import Family, find_family
from llava.families import llava15_original as original
from llava.run_folder import read_object
from llava.weights import (
    ADAPTER_FILES,
    account,
    check_numbers,
    check_settings,
    check_shards,
    digest,
    first_line,
    local_folder,
    naming,
    read_tensors,
    reason,
    refuse,
)

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
WHOLE, ORIGINAL, PEFT_ADAPTER, ORIGINAL_LORA = "llava-hf", "original LLaVA", "PEFT adapter", "original LLaVA LoRA"


@dataclass(frozen=True)
class Checkpoint:
    """What a `--model_name_or_path` is; weights are read by `load`, tokenizer and pictures' settings with `family`."""

    path: str
    dialect: str  # one of the four above
    base: "Checkpoint | None" = None  # below an adapter
    image_tower: str | None = None  # overrides the vision tower that an original checkpoint names
    pad: bool = True  # pictures are padded to a square (`--image_aspect_ratio pad`)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)  # config.json of a whole checkpoint

    @property
    def root(self) -> "Checkpoint":
        """The checkpoint that holds the whole model."""
        return self.base.root if self.base else self

    @property
    def chain(self) -> list[str]:
        """This checkpoint's path, then what it stands on."""
        return [self.path, *(self.base.chain if self.base else [])]

    @cached_property
    def digest(self) -> str:
        """Hash of what decides the weights and settings; see `weights.digest`."""
        return digest(self.chain)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The whole model's config. Raises ValueError for one that this code would read wrongly."""
        if self.base:
            return self.root.config
        with naming(self.path):
            if self.dialect == ORIGINAL:
                config = original.translate_config(self.raw, self.tower)
            else:
                config = AutoConfig.from_pretrained(self.path, trust_remote_code=False)
            find_family(config.model_type).check_config(config)
        return config

    @property
    def num_layers(self) -> int:
        """Blocks of the language model."""
        return self.config.get_text_config().num_hidden_layers

    @property
    def num_heads(self) -> int:
        """Attention heads of each block."""
        return self.config.get_text_config().num_attention_heads

    @cached_property
    def family(self) -> Family:
        """Tokenizer, prompts and picture geometry. Raises ValueError if they are not the model's, FileNotFoundError."""
        place = self.path if (Path(self.path) / "processor_config.json").is_file() else self.root.path
        if place == self.root.path and self.root.dialect == ORIGINAL:
            tokenizer = original.build_tokenizer(local_folder(place), self.config.image_token_id)
            image_processor = original.load_image_processor(self.root.tower, self.config)
        else:
            try:
                tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
                # With torchvision installed the default backend would resample otherwise.
                image_processor = AutoImageProcessor.from_pretrained(place, backend="pil", trust_remote_code=False)
            except Exception as error:  # whatever settings of strange types make them stumble over
                raise FileNotFoundError(f"{place}: no processor to load ({reason(error)})") from error
        with naming(place):
            family = find_family(self.config.model_type)(self.config, tokenizer, image_processor, self.pad)
            picture = Image.new("RGB", (8, 8))  # of which the processor's settings must make something
            family.image(picture.size)
            check_numbers(place, family.pixels([picture]))
        return family

    @property
    def tower(self) -> str:
        """Folder or hub name of an original checkpoint's vision tower. Raises ValueError if nothing names one."""
        return original.tower_of(self.raw, self.image_tower)

    def load(self, dtype: torch.dtype = torch.float32, **settings) -> Any:
        """The model with our attention function installed; with its adapter where this is one.

        `settings` go to transformers' `from_pretrained` (a quantisation). Raises ValueError naming missing, unexpected
        and mis-shaped tensors.
        """
        with naming(self.root.path):
            model = self.root._load_whole(dtype, **settings)
        install(model)
        logger.info("loaded %s: %s parameters in %s", self, f"{model.num_parameters():,}", dtype)
        return self._with_adapters(model)

    def check_tensors(self) -> int:
        """Number of tensors, each accounted for by name and shape, their numbers unread. Raises like `load`."""
        with naming(self.root.path):
            model = self.root._load_whole(torch.float32, device_map="meta")
        return len(self._with_adapters(model).state_dict())

    def __str__(self) -> str:
        return f"{self.path} ({self.dialect})" + (f" on {self.base}" if self.base else "")

    def _load_whole(self, dtype: torch.dtype, **more):
        # Mis-shaped tensors are refused below, by name.
        settings = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True, **more}
        model_class = find_family(self.config.model_type).model_class
        if Path(self.path).is_dir():
            check_shards(Path(self.path))
        try:
            if self.dialect == ORIGINAL:
                state = original.read_state(local_folder(self.path), self.config, self.tower)
                account(self.path, shapes_of(self.config), {name: tensor.shape for name, tensor in state.items()})
                model, report = model_class.from_pretrained(None, config=self.config, state_dict=state, **settings)
                model.name_or_path = self.path
            else:
                model, report = model_class.from_pretrained(self.path, **settings)
        except (OSError, SafetensorError) as error:
            raise FileNotFoundError(f"{self.path}: the weights cannot be read ({first_line(error)})") from error
        refuse(self.path, *(report.get(kind, ()) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")))
        check_numbers(self.path, dict(model.named_parameters()))
        return model

    def _with_adapters(self, model):
        if self.base is None:
            return model
        load = _load_original_lora if self.dialect == ORIGINAL_LORA else _load_peft
        return load(self.base._with_adapters(model), Path(self.path))


def open_checkpoint(path: str, base: str | None = None, image_tower: str | None = None, pad: bool = True) -> Checkpoint:
    """The checkpoint of a folder or hub name, its dialect found by its files; its config is read and checked.

    `base` is what an adapter stands on, instead of the base it names. Raises FileNotFoundError if there is nothing to
    read, ValueError if it is of no family that is known.
    """
    return _open(str(path), base, image_tower, pad, above=())


def _open(path: str, base: str | None, image_tower: str | None, pad: bool, above: tuple[Path, ...]) -> Checkpoint:
    folder = Path(path)
    check_settings(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raw = _read_config(path)
        if raw.get("model_type") == "llava" and "text_config" not in raw and "hidden_size" not in raw:
            raise ValueError(f"{path}: config.json describes no language model (no `text_config`)")
        if not original.is_original(raw):
            try:
                find_family(raw.get("model_type"))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        dialect = ORIGINAL if original.is_original(raw) else WHOLE
        checkpoint = Checkpoint(path, dialect, None, image_tower, pad, raw)
        checkpoint.config  # noqa: B018  read and checked now
        return checkpoint
    if folder.resolve() in above:
        raise ValueError(f"{path}: the adapters stand on each other in a circle; name the base with --base_model")
    named = base or read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{path}: {ADAPTER_CONFIG} names no base model (base_model_name_or_path): give --base_model")
    below = _open(str(named), None, image_tower, pad, (*above, folder.resolve()))
    dialect = ORIGINAL_LORA if original.is_original_lora(folder) else PEFT_ADAPTER
    return Checkpoint(path, dialect, below, image_tower, pad)


def shapes_of(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor that a model of this config loads."""
    with init_empty_weights():
        model = find_family(config.model_type).model_class(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _load_peft(model, folder: Path) -> PeftModel:
    """A PEFT adapter, checked: plain `PeftModel.from_pretrained` leaves a missing tensor at its random start."""
    with naming(folder / ADAPTER_CONFIG):
        adapted = get_peft_model(model, PeftConfig.from_pretrained(folder), autocast_adapter_dtype=False)
    given = read_tensors(folder, ADAPTER_FILES)
    wanted = get_peft_model_state_dict(adapted)
    account(str(folder), _shapes(wanted), _shapes(given))
    check_numbers(str(folder), given)
    if not next(model.parameters()).is_meta:
        set_peft_model_state_dict(adapted, given)
    return adapted


def _load_original_lora(model, folder: Path) -> PeftModel:
    """Base, then fully trained tensors, then LoRA, each checked by name and shape."""
    lora, trained = original.translate_lora(folder)
    check_numbers(str(folder), lora | trained)
    own = dict(model.named_parameters())
    refuse(
        str(folder),
        [],
        [name for name in trained if name not in own],
        [(n, trained[n].shape, own[n].shape) for n in trained if n in own and own[n].shape != trained[n].shape],
    )
    with torch.no_grad():
        for name, tensor in trained.items():
            own[name].copy_(tensor)
    settings = read_object(folder / ADAPTER_CONFIG)
    modules = sorted({name.rsplit(".lora_", 1)[0] for name in lora})
    with naming(folder / ADAPTER_CONFIG):
        scale = {name: settings[name] for name in ("r", "lora_alpha")}
        config = LoraConfig(**scale, lora_dropout=0.0, target_modules=modules)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    wanted = {n: p for n, p in adapted.named_parameters() if ".lora_" in n}
    given = {f"base_model.model.{name.replace('.weight', '.default.weight')}": tensor for name, tensor in lora.items()}
    account(str(folder), _shapes(wanted), _shapes(given))
    with torch.no_grad():
        for name, tensor in given.items():
            wanted[name].copy_(tensor)
    return adapted


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _read_config(path: str) -> dict[str, Any]:
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{path}: the folder has no config.json; is it a checkpoint?")
        return read_object(folder / "config.json")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise FileNotFoundError(f"{path}: no such checkpoint folder, and not a hub name of the form owner/name")
    try:
        return PreTrainedConfig.get_config_dict(path)[0]
    except OSError as error:
        raise FileNotFoundError(
            f"{path}: not a folder here, and the hub gave no config ({first_line(error)}); "
            "download the checkpoint and give its folder"
        ) from error
