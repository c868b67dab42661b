"""The command line of training: three dataclasses and transformers' own TrainingArguments."""

import logging
import math
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig
from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool

from llava import command_line
from llava.attention import layer_range
from llava.command_line import ABOVE_0, BELOW_1, check_numbers, flag
from llava.heads import TOP
from llava.machine import require_usable
from train.llava_hound_dpo import trainer_flags
from train.llava_hound_dpo.losses import ANSWER_ENDS, ATTENTION_LOSSES, PREFERENCE_LOSSES, SMOOTHED, LossSettings
from train.llava_hound_dpo.memory import Zero

logger = logging.getLogger(__name__)

# What `layer_range` and checkpoints call these layers: `auto` was the middle until all were better (docs/results.md).
LAYERS = {"auto": "all", "middle": "auto"}
NO_GAIN = "the study found no gain; last commit with it b4cba4d"
# Flags of earlier scripts that mean nothing here, with what to do instead.
RETIRED = {
    "X": "images are the only modality",
    "training_modal": "images are the only modality",
    "video_tower": "there is no video",
    "video_folder": "there is no video",
    "version": "the template is the checkpoint's own; of LLaVA-1.5 vicuna_v1",
    "mm_projector_type": "the checkpoint's config says it",
    "mm_vision_select_layer": "the checkpoint's config says it",
    "mm_vision_select_feature": "the checkpoint's config says it",
    "mm_use_x_start_end": "the family says what stands around images",
    "mm_use_x_patch_token": "the family says what stands for images",
    "pretrain_mm_mlp_adapter": "the projector comes with the checkpoint",
    "tune_mm_mlp_adapter": "use --freeze_mm_mlp_adapter False",
    "freeze_backbone": "use --lora_enable True, or False for full fine-tuning",
    "lazy_preprocess": "pictures are always read when they are needed",
    "group_by_modality_length": "rows hold no padding, so nothing is gained by sorting",
    "evaluation_strategy": "it is called --eval_strategy",
    "double_quant": "always on with --bits 4",
    "quant_type": "always nf4 with --bits 4",
    "tok_beta": "it had no effect",
    "gpu_hour_price": "multiply the plan's GPU-hours",
    "group_by_length": "rows hold no padding, so nothing is gained by sorting",
    "overwrite_output_dir": "an unfinished run goes on; for a new one choose another --output_dir",
    "logging_dir": "set TENSORBOARD_LOGGING_DIR",
    "resume": "the same command goes on from the newest checkpoint of --output_dir",
    "save_safetensors": "weights are always saved as safetensors",
    "no_cuda": "use --use_cpu True",
    "attention_carry": f"heads by what they carry: {NO_GAIN}",
    "attention_warmup_share": f"warm-up of λ: {NO_GAIN}",
    "attention_schedule": f"decay of λ: {NO_GAIN}",
}


@dataclass
class ModelArguments:
    """Which model, and which of its weights are trained."""

    _argument_group_name = "Model"

    model_name_or_path: str = flag("Checkpoint of any family (docs/families.md): folder or hub name.")
    image_tower: str | None = flag("Vision tower of an original checkpoint, instead of the one it names.", None)
    adapter: str | None = flag("Folder of a LoRA adapter to train on from; its rank and scale stay.", None)
    reference: str = flag(
        "DPO compares with the bare base, or with the adapter as it is when this run begins.", "base",
        choices=["base", "adapter"],
    )  # fmt: skip
    lora_enable: bool = flag("Train LoRA weights; False trains the language model.", True)
    lora_r: int = flag("Rank of LoRA.", 128)
    lora_alpha: int | None = flag("LoRA is scaled by lora_alpha / lora_r; default: twice lora_r.", None)
    lora_dropout: float = flag("LoRA dropout; above 0 the step-0 DPO loss is not ln 2.", 0.0)
    freeze_mm_mlp_adapter: bool = flag("False trains the projector as well.", True)
    bits: int = flag(
        "Bits of the frozen language model below LoRA: 4 (nf4) and 8 need bitsandbytes and CUDA.", 16,
        choices=[4, 8, 16],
    )  # fmt: skip

    def __post_init__(self):
        if self.lora_r == 0:
            raise ValueError("--lora_r 0: without an adapter the language model itself is trained: --lora_enable False")
        if self.lora_alpha is None:
            self.lora_alpha = 2 * self.lora_r
        check_numbers(self, lora_r=(1, 65_536), lora_alpha=(1, None), lora_dropout=(0, BELOW_1))
        if self.adapter and not self.lora_enable:
            raise ValueError("--adapter with --lora_enable False: merge it with `python -m scripts.export` first")
        if self.reference == "adapter" and not self.adapter:
            raise ValueError("--reference adapter: there is none; name its folder with --adapter")

    def go_on_from(self, adapter: PeftConfig, projectors: Sequence[str]) -> None:
        """Take the settings of `adapter` for those that were left alone. Raises ValueError if others were given."""
        has_projector = projectors[0] in (adapter.modules_to_save or ())
        theirs = {"lora_r": adapter.r, "lora_alpha": adapter.lora_alpha, "freeze_mm_mlp_adapter": not has_projector}
        defaults = {"lora_r": type(self).lora_r, "lora_alpha": 2 * self.lora_r, "freeze_mm_mlp_adapter": True}
        for name, value in theirs.items():
            if getattr(self, name) not in (defaults[name], value):
                raise ValueError(f"--{name} {getattr(self, name)}: {self.adapter} has {value}; leave the flag out")
            setattr(self, name, value)

    @property
    def moves_reference(self) -> bool:
        """Whether training changes the reference's own weights, so that its log-probs must be stored before."""
        return not self.lora_enable or self.reference == "adapter"

    @property
    def trained(self) -> str:
        """What is trained, in words."""
        what = "the language model"
        if self.lora_enable:
            scale = self.lora_alpha / self.lora_r
            what = f"LoRA of rank {self.lora_r}, scaled by {self.lora_alpha} / {self.lora_r} = {scale:g}"
            what += f", on from {self.adapter}" if self.adapter else ""
        return what if self.freeze_mm_mlp_adapter else what + ", and the projector"


@dataclass
class DataArguments:
    """Which pairs, and how they are read."""

    _argument_group_name = "Data"

    data_path: str = flag("Preference pairs (train.json): JSON array or JSONL.")
    image_folder: str = flag("Folder, .zip or .tar that the records' image paths are relative to.")
    eval_data_path: str | None = flag("Preference pairs to evaluate on.", None)
    eval_split: float = flag("Share (0..1) of data_path held out for evaluation.", 0.0)
    image_aspect_ratio: str = flag(
        "Of LLaVA-1.5. pad: to a square with the mean colour; crop: what the processor does alone.", "pad",
        choices=["pad", "crop"],
    )  # fmt: skip
    max_image_tokens: int | None = flag("Tokens that a picture may cost, in families where its size decides.", None)
    model_max_length: int = flag("Tokens of prompt and longer answer, images included.", 4096)
    overlong: str = flag("Pairs above model_max_length: stop, or list and drop.", "error", choices=["error", "drop"])
    bad_records: str = flag(
        "Records that cannot be used: stop and say the first, or list and drop them all.", "error",
        choices=["error", "drop"],
    )  # fmt: skip
    leave_out: str | None = flag("Ids of records to leave out, as scripts.doctor --fix_list writes them.", None)
    permute_images: bool = flag(
        "Show the pictures of a training sequence in another order each epoch, numbers and target rewritten.", False
    )
    check_images: str = flag(
        "Before training: decode every picture, read its header, or only see that it is there.", "full",
        choices=["full", "header", "exists"],
    )  # fmt: skip

    def __post_init__(self):
        check_numbers(self, eval_split=(0, BELOW_1), model_max_length=(1, None), max_image_tokens=(1, None))
        if self.eval_split and self.eval_data_path:
            raise ValueError("give --eval_split or --eval_data_path, not both")


@dataclass
class LossArguments:
    """total = dpo_alpha * (L_dpo + attention_weight * L_att) + gamma * (L_sft + attention_weight * L_att).

    With `answer_end` likelihood L_dpo has answer_end_weight * L_end added; with `attention_gate` preferred L_att of
    other pairs is 0.
    """

    _argument_group_name = "Loss"

    dpo_alpha: float = flag("Weight of attention-aware DPO.", 1.0)
    gamma: float = flag("Weight of attention-aware SFT.", 0.0)
    beta: float = flag("DPO's inverse temperature.", 0.1)
    loss_type: str = flag("Preference loss.", "sigmoid", choices=list(PREFERENCE_LOSSES))
    label_smoothing: float = flag("Assumed share of flipped pairs (sigmoid, robust).", 0.0)
    answer_end: str = flag(
        "DPO and the answers' end token: kept in the log-probs, left_out of them, or kept with -log p of the chosen "
        "answer's end added.", "likelihood", choices=list(ANSWER_ENDS),
    )  # fmt: skip
    answer_end_weight: float = flag("Weight of what --answer_end likelihood adds.", 0.1)
    attention_weight: float = flag("λ; 0 gives plain DPO or SFT.", 0.9)
    attention_threshold: float = flag("τ: the ratio from which L_att (hinge) is 0.", 0.75)
    attention_loss: str = flag("hinge: max(0, τ - R); log: -log R.", "hinge", choices=list(ATTENTION_LOSSES))
    attention_layers: str = flag(
        "Zero-based layers of R: auto (all), middle (14-22 of 32, scaled), a range 14-22 or a list 3,5,7.", "auto"
    )
    attention_heads: str | None = flag(
        "File of scripts.discover_heads: R of its best heads (of attention_layers, if given) instead of all.", None
    )
    top_heads: int = flag("How many of the best heads.", TOP)
    attention_rows: str = flag(
        "Rows of R: the first that predicts a token of the chosen answer, the prompt's last, or all of them.", "first",
        choices=["first", "all"],
    )  # fmt: skip
    attention_gate: str = flag(
        "L_att of all pairs (none), or only where the policy prefers the chosen answer to each rejected one.", "none",
        choices=["none", "preferred"],
    )  # fmt: skip

    def __post_init__(self):
        check_numbers(
            self, dpo_alpha=(0, None), gamma=(0, None), attention_weight=(0, None), attention_threshold=(None, None),
            beta=(ABOVE_0, None), label_smoothing=(0, math.nextafter(0.5, 0)), top_heads=(1, None),
            answer_end_weight=(0, None),
        )  # fmt: skip
        if self.dpo_alpha == 0 and self.gamma == 0:
            raise ValueError("--dpo_alpha and --gamma are both 0: there is nothing to train; set one of them above 0")
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            raise ValueError(f"--loss_type {self.loss_type} knows no label smoothing; {' and '.join(SMOOTHED)} do")

    def layers(self, num_layers: int) -> frozenset[int]:
        """The layers of R in a language model of so many. Raises ValueError if it lacks one."""
        return layer_range(num_layers, self._spec)

    @property
    def saved_layers(self) -> str:
        """Their name in a run's identity. Without layers, heads have been those of any, before and after."""
        return "auto" if self.attention_heads and self.attention_layers == "auto" else self._spec

    @property
    def _spec(self) -> str:
        return LAYERS.get(self.attention_layers, self.attention_layers)

    def settings(self) -> LossSettings:
        """The same numbers as `losses.total_loss` takes them."""
        return LossSettings(**{name: getattr(self, name) for name in LossSettings.__dataclass_fields__})


@dataclass
class TrainArguments(TrainingArguments):
    """transformers.TrainingArguments with what this trainer needs fixed, and its own few flags."""

    _argument_group_name = "Run"
    _inherited_group_name = "transformers.TrainingArguments"

    output_dir: str | None = flag("Folder of the checkpoints, the trained weights and run.json.", None)
    dry_run: bool = flag("Check everything, print the plan, load no weights, stop.", False)
    gradient_checkpointing: str = flag(
        "Recompute activations in the backward pass (True), or keep them (False); auto keeps them where the longest "
        "pair's row is estimated to fit on the GPU with them, and recomputes on a CPU.", "auto",
    )  # fmt: skip
    tokens_per_batch: int | None = flag(
        "Pack rows of up to so many tokens, as few as a step needs; 0: per_device_train_batch_size pairs a row. A step "
        "has per_device * accumulation * processes pairs either way. Default: what is estimated to fit on the GPU, at "
        "most 8192; 0 on a CPU.", None,
    )  # fmt: skip
    reference_cache: str | None = flag(
        "Folder of reference log-probs, filled before the first step; runs on the same weights share it. Default: with "
        "LoRA none, they are computed at every step; else, and under ZeRO-3, OUTPUT_DIR/reference.", None,
    )  # fmt: skip
    liger: bool = flag(
        "Fused RMSNorm, RoPE and SwiGLU of the language model: needs liger-kernel and CUDA; not measured yet.", False
    )
    mm_projector_lr: float | None = flag("Learning rate of the projector, if trained; default: learning_rate.", None)
    flop_utilization: float = flag("Share (0..1) of a GPU's peak that the plan assumes; nothing else reads it.", 0.4)
    warmup_ratio: float | None = flag("Share (0..1) of all steps over which the learning rate rises.", None)
    remove_unused_columns: bool = flag("Must stay False: batches are packed rows.", False)
    logging_steps: float = flag("Log every so many optimiser steps.", 1)
    logging_nan_inf_filter: bool = flag("Off: a non-finite loss ends the run.", False)

    def __post_init__(self):
        trainer_flags.refuse(self)
        own = {"mm_projector_lr": (0, None), "tokens_per_batch": (0, None), "flop_utilization": (ABOVE_0, 1)}
        check_numbers(self, **trainer_flags.RANGES, warmup_ratio=(0, BELOW_1), **own)
        if self.warmup_ratio:
            if self.warmup_steps:
                raise ValueError("give --warmup_ratio or --warmup_steps, not both")
            self.warmup_steps = self.warmup_ratio  # below 1 they are a share of all steps
        require_usable(self.use_cpu or self.dry_run)
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        self._choose_precision()
        if self.disable_tqdm is None:  # a bar in a file is one long line
            self.disable_tqdm = not sys.stderr.isatty()
        if not self.deepspeed:  # the flag's empty string, as a script passes it
            self.deepspeed = None
        elif not Path(self.deepspeed).is_file():
            raise FileNotFoundError(f"--deepspeed {self.deepspeed}: no such file; scripts/zero2.json is one")
        Zero.read(self.deepspeed)
        self.deepspeed_file = self.deepspeed
        if self.dry_run:
            self.deepspeed = None  # planning needs no process group
        if self.ddp_find_unused_parameters is None:  # every trained weight is in every row: nothing to look for
            self.ddp_find_unused_parameters = False
        self._choose_checkpointing()
        super().__post_init__()
        if (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=true cuts the attention term off from the weights, so that it would train nothing: "
                "leave it out of the checkpointing arguments"
            )

    def _choose_checkpointing(self) -> None:
        """Under its newer name, without transformers' warning; True until `fitting` chooses, where it is left to it."""
        asked, self.gradient_checkpointing = str(self.gradient_checkpointing).lower(), None
        self.chooses_checkpointing = self.activation_checkpointing is None and asked == "auto"
        if self.activation_checkpointing is None:
            try:
                self.activation_checkpointing = asked == "auto" or string_to_bool(asked)
            except ArgumentTypeError:
                raise ValueError(f"--gradient_checkpointing {asked}: must be True, False or auto") from None

    def _choose_precision(self) -> None:
        """float16 in place of bfloat16 on a card that has none: V100, T4, RTX 8000 emulate it, at a crawl."""
        if self.bf16 and not self.use_cpu and not torch.cuda.is_bf16_supported(including_emulation=False):
            self.bf16, self.fp16 = False, True
            logger.info("%s has no bfloat16: computing in float16", torch.cuda.get_device_name())

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    @property
    def order_seed(self) -> int:
        """Of the order of pairs in an epoch, and of pictures in a pair."""
        return self.seed if self.data_seed is None else self.data_seed

    def accumulate(self, rows: int) -> None:
        """Make so many passes per process and step, also in DeepSpeed's config, which was made from the flags."""
        self.gradient_accumulation_steps = rows
        if self.deepspeed:
            config = self.hf_deepspeed_config.config
            config["gradient_accumulation_steps"] = rows
            config["train_batch_size"] = self.world_size * self.per_device_train_batch_size * rows


def parse(argv: Sequence[str] | None = None) -> tuple[ModelArguments, DataArguments, LossArguments, TrainArguments]:
    """The four groups of flags. Raises ValueError with a nearest name for an unknown flag."""
    groups = (ModelArguments, DataArguments, LossArguments, TrainArguments)
    usage = "run_dpo --model_name_or_path MODEL --data_path PAIRS --image_folder IMAGES --output_dir OUTPUT ..."
    return command_line.parse(groups, "Attention-aware DPO and SFT of vision-language models.", argv, RETIRED, usage)
