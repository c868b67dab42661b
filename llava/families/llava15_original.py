"""The original LLaVA-1.5 format (liuhaotian/llava-v1.5-7b): its config, tensors, tokenizer, and LoRA folders.

Everything is translated into what transformers' LLaVA expects, so that nothing else needs to know of a second dialect.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import torch
from huggingface_hub import save_torch_state_dict
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import generate_merges

from llava.families.family import Family
from llava.families.llava15 import END
from llava.records import IMAGE
from llava.weights import (
    ADAPTER_FILES,
    check_settings,
    first_line,
    first_names,
    local_folder,
    naming,
    read_shard,
    read_tensors,
    tensor_names,
)

logger = logging.getLogger(__name__)

TEXT_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling", "hidden_act", "initializer_range",
    "rope_parameters", "attention_bias", "mlp_bias", "head_dim", "tie_word_embeddings", "bos_token_id", "eos_token_id",
)  # fmt: skip
# Original name to ours; the first prefix that fits wins. None: a buffer that is computed, not loaded.
PREFIXES = (
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    ("lm_head.", "lm_head."),
)
LAYERS = re.compile(r"^(\^?)model\\?\.layers")  # as patterns of modules begin
# Settings with which the original code computes something else than LLaVA-1.5: only these values are read rightly.
ONLY = {
    "mm_projector_type": ("mlp2x_gelu",), "mm_vision_select_feature": ("patch",), "mm_use_im_start_end": (False,),
    "mm_patch_merge_type": ("flat",), "image_aspect_ratio": ("pad", "square", None),
}  # fmt: skip
COMPUTED = (".rotary_emb.inv_freq", ".position_ids")
VOCABULARY_STEP = 64  # rows are padded to a multiple of this above the image token, as in llava-hf
NON_LORA = "non_lora_trainables.bin"


def is_original(raw: Mapping) -> bool:
    """Whether a config.json is of the original format."""
    return "text_config" not in raw and ("mm_vision_tower" in raw or raw.get("model_type") in ("llava", "llava_llama"))


def is_original_lora(folder: Path) -> bool:
    """Whether an adapter is of the original format: by the names of its tensors, not by what lies beside them."""
    if (folder / NON_LORA).is_file():
        return True
    bare = [_without_wrappers(name) for name in tensor_names(folder, ADAPTER_FILES)]
    return any(name.startswith(("model.layers.", "model.mm_projector.")) for name in bare)


def translate_config(raw: Mapping, tower: str) -> LlavaConfig:
    """The config as transformers has it. The image token is the first id after the original vocabulary.

    Raises ValueError for a projector or feature choice that LLaVA-1.5 does not have.
    """
    for name, value in ({"mm_projector_type": "linear"} | dict(raw)).items():
        if name in ONLY and value not in ONLY[name]:
            raise ValueError(f"{name} {value!r}: LLaVA-1.5 has {ONLY[name][0]!r}; no other LLaVA is read here")
    check_settings(local_folder(tower))
    vision = CLIPVisionConfig.from_pretrained(local_folder(tower))
    image_token = raw["vocab_size"]
    rows = -(-(image_token + 1) // VOCABULARY_STEP) * VOCABULARY_STEP
    text = LlamaConfig.from_dict({k: raw[k] for k in TEXT_FIELDS if k in raw} | {"vocab_size": rows, "pad_token_id": 0})
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=raw.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def tower_of(raw: Mapping, image_tower: str | None, folder: Path) -> str:
    """Folder or hub name of the vision tower. Raises ValueError if neither the config nor a flag names one.

    Where the named folder is gone, the one of its name in the checkpoint's folder, or beside it, is taken.
    """
    tower = image_tower or raw.get("mm_vision_tower") or raw.get("mm_image_tower")
    if not tower:
        raise ValueError("config.json names no vision tower (`mm_vision_tower`): give --image_tower")
    name = PurePosixPath(tower.replace("\\", "/")).name
    near = [place for place in (folder / name, folder.parent / name) if (place / "config.json").is_file()]
    if image_tower or not near or Path(tower).is_dir():
        return tower
    logger.info("%s: its vision tower %s is not there, %s is taken", folder, tower, near[0])
    return str(near[0])


def translate_name(name: str) -> str | None:
    """Our name of an original tensor; None for a computed buffer. Raises KeyError for a name that means nothing."""
    if name.endswith(COMPUTED):
        return None
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise KeyError(name)


def read_state(folder: Path, config: LlavaConfig, tower: str) -> dict[str, torch.Tensor]:
    """The whole model's tensors under our names, vision tower included, vocabulary rows padded.

    Raises ValueError naming tensors of the original that mean nothing to LLaVA-1.5.
    """
    state = _translated(folder, read_tensors(folder), bare=str)
    if not any(name.startswith("model.vision_tower.") for name in state):
        state |= read_tower(local_folder(tower))
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            state[name] = pad_rows(state[name], config.text_config.vocab_size)
    return state


def read_tower(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a CLIP checkpoint's vision model under our names; its text half is not ours to load."""
    state = {}
    for name, tensor in read_tensors(folder).items():
        bare = name.removeprefix("vision_model.")
        if name.startswith(("text_", "logit_scale", "visual_projection")) or name.endswith(COMPUTED):
            continue
        state[f"model.vision_tower.{bare}"] = tensor
    return state


def pad_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """The matrix with rows of its mean added.

    A mean row's logit is the mean of all logits, so it never wins, and by Jensen's inequality 64 of them add less
    than 64 / 32000 = 0.2 % to a softmax's denominator. Random rows could do anything.
    """
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


def load_image_processor(tower: str, config: LlavaConfig):
    """The vision tower's own image processor, or CLIP's of its size."""
    folder = local_folder(tower)
    if (folder / "preprocessor_config.json").is_file():
        with naming(folder / "preprocessor_config.json"):
            return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    side = config.vision_config.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def build_tokenizer(folder: Path, image_token: int) -> PreTrainedTokenizerFast:
    """LLaMA's sentencepiece tokenizer, merges ordered by score, with `<image>` behind the vocabulary.

    transformers' own conversion orders the merges by id and gives runs of blanks other ids than sentencepiece does.
    Raises FileNotFoundError without `tokenizer.model`, ValueError if its size does not fit the model's.
    """
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer.model; an original LLaVA checkpoint has one")
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: cannot be read by sentencepiece ({first_line(error)})") from error
    names = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    if len(names) != image_token:
        raise ValueError(f"{path}: {len(names)} pieces, but the model's vocabulary has {image_token} rows")
    vocabulary = {name: i for i, name in enumerate(names)}
    scores = {name: pieces.get_score(i) for i, name in enumerate(names)}
    merges = generate_merges(vocabulary, scores)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    start = names[pieces.bos_id()]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start} $B:1", special_tokens=[(start, pieces.bos_id())]
    )
    specials = ["<unk>", start, END, IMAGE]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token=start,
        eos_token=END,
        pad_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE},
    )


def translate_lora(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(LoRA tensors, fully trained tensors) of an original LoRA folder, under our names.

    LoRA names are module path + `.lora_A.weight` or `.lora_B.weight`, without PEFT's prefix. Raises ValueError naming
    tensors that mean nothing here.
    """
    trained = read_shard(folder / NON_LORA) if (folder / NON_LORA).is_file() else {}
    lora = read_tensors(folder, ADAPTER_FILES)
    return _translated(folder, lora, _without_wrappers), _translated(folder / NON_LORA, trained, _without_wrappers)


def translate_settings(settings: Mapping) -> dict:
    """adapter_config.json with our names of the modules that have a rank or scale of their own; the rest is PEFT's."""
    renamed = {
        name: {LAYERS.sub(r"\1model.language_model.layers", key): value for key, value in settings[name].items()}
        for name in ("rank_pattern", "alpha_pattern") if settings.get(name)
    }  # fmt: skip
    return {**settings, **renamed}


def _without_wrappers(name: str) -> str:
    """A tensor's name without what PEFT and data parallelism put before it."""
    while name.startswith(("base_model.model.", "module.")):
        name = name.removeprefix("module.").removeprefix("base_model.model.")
    return name


def _translated(path: Path, tensors: Mapping[str, torch.Tensor], bare: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """Tensors under our names, computed buffers left out; `bare` gives the original name of each."""
    found, unknown = {}, []
    for name, tensor in tensors.items():
        try:
            ours = translate_name(bare(name))
        except KeyError:
            unknown.append(name)
            continue
        if ours is not None:
            found[ours] = tensor
    if unknown:
        raise ValueError(f"{path}: unexpected tensors: {first_names(unknown)}")
    return found


def write_checkpoint(model, family: Family, folder: Path, chain: Sequence[str]) -> None:
    """Write a model in the original layout: safetensors in shards, vision tower and its processor in `vision_tower/`.

    `tokenizer.model` cannot be made from a fast tokenizer: it is copied from the first of `chain` that has one, a
    checkpoint and what it stands on. Raises FileNotFoundError if none has.
    """
    config, state = model.config, model.state_dict()
    vocabulary, tower_folder = find_tokenizer_model(chain), folder.resolve() / "vision_tower"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in state.items():
        theirs = next((old + name.removeprefix(new) for old, new in PREFIXES if name.startswith(new)), None)
        if theirs is None or "vision_tower" in theirs:
            continue
        is_vocabulary = theirs in ("model.embed_tokens.weight", "lm_head.weight")
        tensors[theirs] = tensor[: config.image_token_id].clone() if is_vocabulary else tensor
    save_torch_state_dict(tensors, folder)
    tower = CLIPVisionModel(config.vision_config).to(model.dtype)
    tower.load_state_dict(model.model.vision_tower.state_dict())
    tower.save_pretrained(tower_folder)
    family.image_processor.save_pretrained(tower_folder)
    text = config.text_config
    written = {name: getattr(text, name) for name in TEXT_FIELDS if hasattr(text, name)}
    written |= {"rope_theta": text.rope_parameters.get("rope_theta", 10000.0), "vocab_size": config.image_token_id}
    written |= {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "pad_token_id": 0,
        "torch_dtype": str(model.dtype).removeprefix("torch."), "mm_vision_tower": str(tower_folder),
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch", "mm_hidden_size": config.vision_config.hidden_size,
        "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if family.pad else "square",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    shutil.copy(vocabulary, folder / "tokenizer.model")


def find_tokenizer_model(chain: Sequence[str]) -> Path:
    """`tokenizer.model` of the first of these checkpoints that has one. Raises FileNotFoundError if none has."""
    for path in chain:
        if (Path(path) / "tokenizer.model").is_file():
            return Path(path) / "tokenizer.model"
    raise FileNotFoundError(
        f"{chain[-1]}: no tokenizer.model, which the original layout needs: copy liuhaotian/llava-v1.5-7b's there"
    )
