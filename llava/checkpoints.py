"""A checkpoint of any family, opened once: transformers' layout, the original LLaVA format, or a LoRA on either.

Every tensor is accounted for. What is missing, unexpected or of another shape is an error with its name; nothing
starts from random numbers.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, ProcessorMixin
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.peft_utils import find_adapter_config_file

from llava.attention import install
from llava.families import Family, find_family, refuse_unknown
from llava.families import llava15_original as original
from llava.merging import merge
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
    stored_numbers,
    tensor_names,
)

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
PICTURES = ("processor_config.json", "preprocessor_config.json")  # either has the pictures' settings
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What names modules in an adapter_config.json.
NAMING = ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_pattern")
WHOLE, ORIGINAL, PEFT_ADAPTER, ORIGINAL_LORA = "transformers", "original LLaVA", "PEFT adapter", "original LLaVA LoRA"


@dataclass(frozen=True)
class Checkpoint:
    """What a `--model_name_or_path` is; weights are read by `load`, tokenizer and pictures' settings with `family`."""

    path: str
    dialect: str  # one of the four above
    base: "Checkpoint | None" = None  # below an adapter
    image_tower: str | None = None  # overrides the vision tower that an original checkpoint names
    pad: bool | None = None  # pictures are padded to a square; None: as the checkpoint says, else they are
    max_image_tokens: int | None = None  # that a picture may cost; None: as the checkpoint says
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
            find_family(config).check_config(config)
            if not is_deepspeed_zero3_enabled():  # which would share out even this
                shapes_of(config)  # what no model can be built of stumbles here
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
        has_own = any((Path(self.path) / name).is_file() for name in PICTURES)
        place = self.path if has_own else self.root.path
        is_original = place == self.root.path and self.root.dialect == ORIGINAL
        pad, settings = self.pad, None
        if is_original:
            tokenizer = original.build_tokenizer(local_folder(place), self.config.image_token_id)
            image_processor = original.load_image_processor(self.root.tower, self.config)
            pad = self.root.raw.get("image_aspect_ratio", "pad") == "pad" if pad is None else pad
        else:
            try:
                tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
                # With torchvision installed the default backend would resample otherwise.
                image_processor = AutoImageProcessor.from_pretrained(place, backend="pil", trust_remote_code=False)
                settings = ProcessorMixin.get_processor_dict(place)[0]
                # Where older processors have it, which a tokenizer alone does not read.
                tokenizer.chat_template = tokenizer.chat_template or settings.get("chat_template")
            except Exception as error:  # whatever settings of strange types make them stumble over
                raise FileNotFoundError(f"{place}: no processor to load ({reason(error)})") from error
        with naming(place):
            family = find_family(self.config)(self.config, tokenizer, image_processor, pad)
            family.source = None if is_original else local_folder(place)
            if self.max_image_tokens is not None:
                family.cap(self.max_image_tokens)
            picture = Image.new("RGB", (8, 8))  # of which the processor's settings must make something
            family.image(picture.size)
            check_numbers(place, family.pixels([picture]))
            problem = None if is_original else family.check_processor(settings)
        if problem:
            logger.warning("%s: %s", place, problem)
        return family

    @property
    def tower(self) -> str:
        """Folder or hub name of an original checkpoint's vision tower. Raises ValueError if nothing names one."""
        return original.tower_of(self.raw, self.image_tower, Path(self.path))

    @property
    def stored(self) -> Counter[torch.dtype]:
        """How many numbers of each precision the whole model has on disk, read from headers. Raises like `load`."""
        found = stored_numbers(local_folder(self.root.path))
        return found + stored_numbers(local_folder(self.root.tower)) if self.root.dialect == ORIGINAL else found

    def load(self, dtype: torch.dtype = torch.float32, exact_adapter: bool = False, **settings) -> Any:
        """The model with our attention function installed; with its adapter where this is one.

        With `exact_adapter` what an adapter brings, and all but the language model, is in float32 whatever `dtype` is.
        `settings` go to transformers' `from_pretrained` (a quantisation, a device). Raises ValueError naming missing,
        unexpected and mis-shaped tensors.
        """
        with naming(self.root.path):
            model = self.root._load_whole(dtype, **settings)
        install(model)
        logger.info("loaded %s: %s parameters in %s", self, f"{model.num_parameters():,}", dtype)
        if exact_adapter:
            family = find_family(self.config)
            for name, parameter in model.named_parameters():
                if family.part_of(name) in (family.tower, family.projectors[0]):
                    parameter.data = parameter.data.float()
        return self._with_adapters(model, exact_adapter, is_quantised="quantization_config" in settings)

    def check_tensors(self) -> int:
        """Number of tensors, each accounted for by name and shape, their numbers unread. Raises like `load`."""
        with naming(self.root.path):
            model = self.root._load_whole(torch.float32, device_map="meta")
        return len(self._with_adapters(model).state_dict())

    def __str__(self) -> str:
        kind = find_family(self.config).name if self.dialect == WHOLE else self.dialect
        return f"{self.path} ({kind})" + (f" on {self.base}" if self.base else "")

    def _load_whole(self, dtype: torch.dtype, **more):
        # Mis-shaped tensors are refused below, by name.
        settings = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True, **more}
        model_class = find_family(self.config).model_class(self.config)
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

    def _with_adapters(self, model, is_exact: bool = False, is_quantised: bool = False):
        if self.base is None:
            return model
        model, folder = self.base._with_adapters(model, is_exact, is_quantised), Path(self.path)
        if isinstance(model, PeftModel):  # PEFT would put this adapter in the lower one's place
            model, _ = merge(model)
        bits = read_object(folder / ADAPTER_CONFIG).get("bits", 16)
        if bits != 16 and not is_quantised:
            logger.warning(
                "%s was trained on a base of %s bits, which is read at full precision here: answers may differ from "
                "those it was trained to give", folder, bits,
            )  # fmt: skip
        load = _load_original_lora if self.dialect == ORIGINAL_LORA else _load_peft
        return load(model, folder, find_family(self.config), is_exact)


def open_checkpoint(
    path: str, base: str | None = None, image_tower: str | None = None, pad: bool | None = None,
    max_image_tokens: int | None = None,
) -> Checkpoint:  # fmt: skip
    """The checkpoint of a folder or hub name, its dialect found by its files; its config is read and checked.

    `base` is what an adapter stands on, instead of the base it names; `pad` whether pictures are padded to a square,
    instead of what it says; `max_image_tokens` how many a picture may cost. Raises FileNotFoundError if there is
    nothing to read, ValueError if it is of no family that is known.
    """
    return _open(str(path), base, (image_tower, pad, max_image_tokens), above=())


def _open(path: str, base: str | None, settings: tuple, above: tuple[Path, ...]) -> Checkpoint:
    """`settings`: the last fields of `Checkpoint`, which are the same along the chain."""
    if not Path(path).exists() and HUB_NAME.fullmatch(path) and find_adapter_config_file(path):
        path = str(local_folder(path))
    folder = Path(path)
    check_settings(folder)
    if not (folder / ADAPTER_CONFIG).is_file():
        raw = _read_config(path)
        if raw.get("model_type") == "llava" and "text_config" not in raw and "hidden_size" not in raw:
            raise ValueError(f"{path}: config.json describes no language model (no `text_config`)")
        if not original.is_original(raw):
            try:
                refuse_unknown(raw)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        dialect = ORIGINAL if original.is_original(raw) else WHOLE
        checkpoint = Checkpoint(path, dialect, None, *settings, raw)
        checkpoint.config  # noqa: B018  read and checked now
        return checkpoint
    if folder.resolve() in above:
        raise ValueError(f"{path}: the adapters stand on each other in a circle; name the base with --base_model")
    named = base or read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{path}: {ADAPTER_CONFIG} names no base model (base_model_name_or_path): give --base_model")
    if not base:
        named = _found(str(named), folder)
    try:
        below = _open(str(named), None, settings, (*above, folder.resolve()))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} stands on {error}; or name its base with --base_model") from error
    dialect = ORIGINAL_LORA if original.is_original_lora(folder) else PEFT_ADAPTER
    return Checkpoint(path, dialect, below, *settings)


def _found(named: str, folder: Path) -> str:
    """The base that an adapter names; a relative path of a run elsewhere is looked for above the adapter, too."""
    if Path(named).exists() or Path(named).is_absolute():
        return named
    for above in folder.resolve().parents:
        if (above / named / "config.json").is_file() or (above / named / ADAPTER_CONFIG).is_file():
            logger.info("%s: its base %s is %s", folder, named, above / named)
            return str(above / named)
    return named


def shapes_of(config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor that a model of this config loads."""
    with init_empty_weights(), no_init_weights():  # nor are numbers drawn that nobody sees
        model = find_family(config).model_class(config)(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _load_peft(model, folder: Path, family: type[Family], is_exact: bool) -> PeftModel:
    """A PEFT adapter, checked: plain `PeftModel.from_pretrained` leaves a missing tensor at its random start."""
    with naming(folder / ADAPTER_CONFIG):
        settings = adapter_settings(folder, family)
        adapted = get_peft_model(model, settings, autocast_adapter_dtype=is_exact)
    fill_adapter(adapted, folder, family)
    return adapted


def adapter_settings(folder: Path, family: type[Family]) -> PeftConfig:
    """Of a PEFT adapter, with today's names of modules."""
    settings, names = read_object(folder / ADAPTER_CONFIG), tensor_names(folder, ADAPTER_FILES)
    settings.pop("bits", None)
    if any(map(family.is_older_name, names)):
        settings = {name: family.renewed(value) if name in NAMING else value for name, value in settings.items()}
    return PeftConfig.from_peft_type(**settings)


def fill_adapter(adapted: PeftModel, folder: Path, family: type[Family]) -> None:
    """Put a folder's tensors into the adapter of its settings. Raises ValueError naming those that do not fit."""
    given = read_tensors(folder, ADAPTER_FILES)
    wanted = get_peft_model_state_dict(adapted)
    given = _under_our_names(folder, given, wanted, family)
    account(str(folder), _shapes(wanted), _shapes(given))
    check_numbers(str(folder), given)
    if not next(adapted.parameters()).is_meta:
        set_peft_model_state_dict(adapted, given)


def _under_our_names(folder: Path, given: Mapping[str, torch.Tensor], wanted: Iterable[str], family: type[Family]):
    """The tensors, those of older transformers, PEFT or wrappers renamed, which one line says."""
    if set(given) == set(wanted):
        return given
    ours = {family.bare_name(name): name for name in wanted}
    names = {name: ours.get(family.bare_name(name), name) for name in given}
    renamed = {old: new for old, new in names.items() if old != new}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{folder}: some of its tensors are there twice, under an older and a newer name")
    if renamed:
        old, new = next(iter(renamed.items()))
        logger.info("%s: %d tensors have names of other versions, renamed: %s is %s", folder, len(renamed), old, new)
    return {names[name]: tensor for name, tensor in given.items()}


def _load_original_lora(model, folder: Path, family: type[Family], is_exact: bool) -> PeftModel:
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
    with naming(folder / ADAPTER_CONFIG):
        settings = original.translate_settings(read_object(folder / ADAPTER_CONFIG))
        settings["target_modules"] = sorted({name.rsplit(".lora_", 1)[0] for name in lora})
        adapted = get_peft_model(model, PeftConfig.from_peft_type(**settings), autocast_adapter_dtype=is_exact)
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
    if not HUB_NAME.fullmatch(path):
        raise FileNotFoundError(f"{path}: no such checkpoint folder, and not a hub name of the form owner/name")
    try:
        return PreTrainedConfig.get_config_dict(path)[0]
    except OSError as error:
        raise FileNotFoundError(
            f"{path}: not a folder here, and the hub gave no config ({first_line(error)}); "
            "download the checkpoint and give its folder"
        ) from error
