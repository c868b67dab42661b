"""The policy: a model with LoRA or with a trainable language model, and a table of what is trained."""

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_bitsandbytes_available, is_liger_kernel_available

from llava.checkpoints import adapter_settings, fill_adapter
from llava.families import Family, find_family
from train.llava_hound_dpo.arguments import ModelArguments

# Language models whose blocks liger-kernel fuses, each compared with its own blocks in the tests. Of the Qwen-VLs it
# (0.8.5) wants classes that transformers no longer has.
FUSED = ("llama", "qwen2", "qwen3")


@dataclass
class QuantisedLora(LoraConfig):
    """LoRA that tells in its adapter_config.json on how many bits it was trained; plain peft passes over it."""

    bits: int = 4


def refuse_quantised(arguments: ModelArguments, zero_stage: int) -> None:
    """Raises ValueError where a base of fewer than 16 bits cannot be trained on, or not on this machine."""
    bits = f"--bits {arguments.bits}"
    if arguments.bits == 16:
        return
    if not arguments.lora_enable:
        raise ValueError(f"{bits} with --lora_enable False: quantised weights cannot be trained: use LoRA or --bits 16")
    if zero_stage == 3:
        raise ValueError(
            f"{bits} with ZeRO-3: quantised weights cannot be shared out over processes; use --deepspeed "
            "scripts/zero2.json, or --bits 16"
        )
    if not is_bitsandbytes_available():
        raise ValueError(f"{bits} needs bitsandbytes, which is not installed: pip install bitsandbytes, or --bits 16")
    if not torch.cuda.is_available():
        raise ValueError(f"{bits} needs a CUDA device, and there is none here: use --bits 16")


def refuse_fused(config: PreTrainedConfig) -> None:
    """Raises ValueError where `--liger True` cannot be done with a model, or not on this machine."""
    kind = config.get_text_config(decoder=True).model_type
    if kind not in FUSED:
        raise ValueError(
            f"--liger True knows the language models {', '.join(FUSED)}, and this checkpoint's ({config.model_type}) "
            f"is of type {kind}: leave it out"
        )
    if not is_liger_kernel_available() or find_spec("triton") is None:
        raise ValueError(
            "--liger True needs liger-kernel and triton, which are not installed: pip install liger-kernel, or leave "
            "it out"
        )
    if not torch.cuda.is_available():
        raise ValueError("--liger True needs a CUDA device, and there is none here: leave it out")


def fuse(model, family: type[Family]) -> None:
    """Compute RMSNorm, RoPE and SwiGLU of the language model with liger-kernel's fused kernels, from here on.

    Attention and the output layer stay ours: its fused loss would leave no log-probs to read. RoPE is exchanged in
    transformers' module, for all models of the process.
    """
    parts = dict.fromkeys(("rope", "rms_norm", "swiglu"), True)
    losses = dict.fromkeys(("cross_entropy", "fused_linear_cross_entropy"), False)
    apply_liger_kernel(model.get_submodule(f"model.{family.language}"), parts | losses)


def quantisation(bits: int, family: type[Family], dtype: torch.dtype, device: str | torch.device) -> dict:
    """What transformers' `from_pretrained` takes for a language model of this many bits; nothing for 16.

    Linear layers of the language model only: the vision tower, the projector and the head stay as they are. QLoRA's
    choice of nf4 with quantised constants, computing in `dtype`. Source: arXiv 2305.14314.
    """
    if bits == 16:
        return {}
    kind = {"load_in_8bit": True} if bits == 8 else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }  # fmt: skip
    skipped = [f"model.{family.tower}", *(f"model.{part}" for part in family.projectors), "lm_head"]
    settings = BitsAndBytesConfig(**kind, llm_int8_skip_modules=skipped)
    return {"quantization_config": settings, "device_map": {"": str(device)}}


def build_on_meta(config: PreTrainedConfig, arguments: ModelArguments):
    """The policy without any weight, for counting."""
    with init_empty_weights():
        family = find_family(config)
        return make_trainable(family.model_class(config)(config), family, arguments)


def make_trainable(model, family: type[Family], arguments: ModelArguments, fp32_adapter: bool = False):
    """Freeze the vision tower always, the projector unless asked for; add LoRA or free the language model.

    `fp32_adapter` keeps LoRA in fp32 on a reduced-precision base: needed where the optimiser has no master copy.
    """
    if getattr(model, "is_quantized", False):
        # Freezes, and keeps in fp32 what is not quantised. The Trainer turns checkpointing on, non-reentrant.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if arguments.lora_enable:
        if model.name_or_path and Path(model.name_or_path).is_dir():  # an adapter's base is found from any folder
            model.name_or_path = str(Path(model.name_or_path).resolve())
        # DeepSpeed has its own fp32 copy, and ZeRO-3 stops at fp32 LoRA weights beside a bf16 projector.
        settings = lora_settings(family, model.config, arguments)
        adapted = get_peft_model(model, settings, autocast_adapter_dtype=fp32_adapter)
        if arguments.adapter:
            fill_adapter(adapted, Path(arguments.adapter), family)
        return adapted
    for name, parameter in model.named_parameters():
        part = family.part_of(name)
        trains_projector = part == family.projectors[0] and not arguments.freeze_mm_mlp_adapter
        parameter.requires_grad_(trains_projector or part in (family.language, "lm_head"))
    return model


def lora_settings(family: type[Family], config: PreTrainedConfig, arguments: ModelArguments) -> PeftConfig:
    """Of a new adapter, or those of the one that is trained on from."""
    kind = LoraConfig if arguments.bits == 16 else partial(QuantisedLora, bits=arguments.bits)
    if arguments.adapter:
        theirs = adapter_settings(Path(arguments.adapter), family).to_dict()
        return kind(**theirs | {"inference_mode": False, "lora_dropout": arguments.lora_dropout})
    return kind(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=family.lora_targets(),
        # As a saved module the projector is in every checkpoint's adapter, and the reference keeps the old one.
        modules_to_save=None if arguments.freeze_mm_mlp_adapter else family.projector_modules(config),
    )


def parameter_table(model, family: type[Family]) -> str:
    """One line per part of the model: parameters, how many are trained, dtype."""
    rows = {part: [0, 0, set()] for part in family.parts()}
    for name, parameter in model.named_parameters():
        row = rows[family.part_of(name)]
        count = _size(parameter)
        row[0] += count
        row[1] += count if parameter.requires_grad else 0
        row[2].add(str(parameter.dtype).removeprefix("torch."))
    lines = [f"{'module':<24}{'parameters':>16}{'trained':>16}  dtype"]
    lines += [f"{part:<24}{n:>16,}{t:>16,}  {', '.join(sorted(d))}" for part, (n, t, d) in rows.items()]
    return "\n".join(lines)


def _size(parameter) -> int:
    """Numbers in a parameter: ZeRO-3 leaves an empty tensor behind, 4 bits are packed two to a byte."""
    if getattr(parameter, "quant_state", None) is not None:
        return parameter.quant_state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def count_parameters(model) -> tuple[int, int]:
    """(all, trained) parameters."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)
