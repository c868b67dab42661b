"""The policy: a LLaVA with LoRA or with a trainable language model, and a table of what is trained."""

from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava.checkpoints import LORA_TARGETS, PROJECTOR
from train.llava_hound_dpo.arguments import ModelArguments

PARTS = ("vision_tower", PROJECTOR, "language_model", "lm_head")


def build_on_meta(config: LlavaConfig, arguments: ModelArguments):
    """The policy without any weight, for counting."""
    with init_empty_weights():
        return make_trainable(LlavaForConditionalGeneration(config), arguments)


def make_trainable(model, arguments: ModelArguments, fp32_adapter: bool = False):
    """Freeze the vision tower always, the projector unless asked for; add LoRA or free the language model.

    `fp32_adapter` keeps LoRA in fp32 on a reduced-precision base: needed where the optimiser has no master copy.
    """
    if arguments.lora_enable:
        settings = LoraConfig(
            r=arguments.lora_r,
            lora_alpha=arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=LORA_TARGETS,
            # As a saved module the projector is in every checkpoint's adapter, and the reference keeps the old one.
            modules_to_save=None if arguments.freeze_mm_mlp_adapter else [PROJECTOR],
        )
        # DeepSpeed has its own fp32 copy, and ZeRO-3 stops at fp32 LoRA weights beside a bf16 projector.
        return get_peft_model(model, settings, autocast_adapter_dtype=fp32_adapter)
    for name, parameter in model.named_parameters():
        is_projector = PROJECTOR in name
        trained = not arguments.freeze_mm_mlp_adapter if is_projector else "vision_tower" not in name
        parameter.requires_grad_(trained)
    return model


def parameter_table(model) -> str:
    """One line per part of the model: parameters, how many are trained, dtype."""
    rows = {part: [0, 0, set()] for part in PARTS}
    for name, parameter in model.named_parameters():
        row = rows[next(part for part in PARTS if part in name)]
        count = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor behind
        row[0] += count
        row[1] += count if parameter.requires_grad else 0
        row[2].add(str(parameter.dtype).removeprefix("torch."))
    lines = [f"{'module':<24}{'parameters':>16}{'trained':>16}  dtype"]
    lines += [f"{part:<24}{n:>16,}{t:>16,}  {', '.join(sorted(d))}" for part, (n, t, d) in rows.items()]
    return "\n".join(lines)


def count_parameters(model) -> tuple[int, int]:
    """(all, trained) parameters."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained)
