"""The command line of training: three dataclasses and transformers' own TrainingArguments."""

import difflib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from transformers import HfArgumentParser, TrainingArguments

from llava.heads import TOP
from train.llava_hound_dpo.losses import (
    ATTENTION_LOSSES,
    PREFERENCE_LOSSES,
    SMOOTHED,
    LossSettings,
)

NO_GAIN = "the study found no gain; last commit with it b4cba4d"
# Flags of earlier scripts that mean nothing here, with what to do instead.
RETIRED = {
    "X": "images are the only modality",
    "training_modal": "images are the only modality",
    "video_tower": "there is no video",
    "video_folder": "there is no video",
    "version": "the template is always vicuna_v1, the one LLaVA-1.5 was trained with",
    "mm_projector_type": "the checkpoint's config says it",
    "mm_vision_select_layer": "the checkpoint's config says it",
    "mm_vision_select_feature": "the checkpoint's config says it",
    "mm_use_x_start_end": "LLaVA-1.5 has no start and end tokens around images",
    "mm_use_x_patch_token": "LLaVA-1.5 has no patch token",
    "pretrain_mm_mlp_adapter": "the projector comes with the checkpoint",
    "tune_mm_mlp_adapter": "use --freeze_mm_mlp_adapter False",
    "freeze_backbone": "use --lora_enable True, or False for full fine-tuning",
    "lazy_preprocess": "pictures are always read when they are needed",
    "group_by_modality_length": "rows hold no padding, so nothing is gained by sorting",
    "evaluation_strategy": "it is called --eval_strategy",
    "double_quant": "always on with --bits 4",
    "quant_type": "always nf4 with --bits 4",
    "tok_beta": "it had no effect",
    "attention_carry": f"heads by what they carry: {NO_GAIN}",
    "attention_warmup_share": f"warm-up of λ: {NO_GAIN}",
    "attention_schedule": f"decay of λ: {NO_GAIN}",
}

# Flags of transformers.TrainingArguments that would change which pairs a step has.
FIXED = {
    "dataloader_drop_last": False,
    "train_sampling_strategy": "random",
    "ignore_data_skip": False,
    "auto_find_batch_size": False,
}


@dataclass
class ModelArguments:
    """Which model, and which of its weights are trained."""

    model_name_or_path: str = field(metadata={"help": "LLaVA-1.5, llava-hf or original format: folder or hub name."})
    image_tower: str | None = field(
        default=None, metadata={"help": "Vision tower of an original checkpoint, instead of the one it names."}
    )
    lora_enable: bool = field(default=True, metadata={"help": "Train LoRA weights; False trains the language model."})
    lora_r: int = field(default=128, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=256, metadata={"help": "LoRA is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "LoRA dropout; above 0 the step-0 DPO loss is not ln 2."}
    )
    freeze_mm_mlp_adapter: bool = field(default=True, metadata={"help": "False trains the projector as well."})
    bits: int = field(
        default=16,
        metadata={"help": "Bits of the frozen language model below LoRA: 4 (nf4) and 8 need bitsandbytes and CUDA.",
                  "choices": [4, 8, 16]},
    )  # fmt: skip


@dataclass
class DataArguments:
    """Which pairs, and how they are read."""

    data_path: str = field(metadata={"help": "Preference pairs (train.json): JSON array or JSONL."})
    image_folder: str = field(metadata={"help": "Folder, .zip or .tar that the records' image paths are relative to."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Preference pairs to evaluate on."})
    eval_split: float = field(default=0.0, metadata={"help": "Share (0..1) of data_path held out for evaluation."})
    image_aspect_ratio: str = field(
        default="pad",
        metadata={"help": "pad: to a square with the mean colour, as LLaVA-1.5; crop: what the processor does alone.",
                  "choices": ["pad", "crop"]},
    )  # fmt: skip
    model_max_length: int = field(
        default=4096, metadata={"help": "Tokens of prompt and longer answer, images included."}
    )
    overlong: str = field(
        default="error",
        metadata={
            "help": "Pairs above model_max_length: stop, or drop and list them.",
            "choices": ["error", "drop"],
        },
    )
    check_images: str = field(
        default="full",
        metadata={"help": "Before training: decode every picture, read its header, or only see that it is there.",
                  "choices": ["full", "header", "exists"]},
    )  # fmt: skip

    def __post_init__(self):
        if not 0 <= self.eval_split < 1:
            raise ValueError(f"--eval_split {self.eval_split}: a share from 0 up to, not including, 1")
        if self.eval_split and self.eval_data_path:
            raise ValueError("give --eval_split or --eval_data_path, not both")


@dataclass
class LossArguments:
    """total = dpo_alpha * (L_dpo + attention_weight * L_att) + gamma * (L_sft + attention_weight * L_att)."""

    dpo_alpha: float = field(default=1.0, metadata={"help": "Weight of attention-aware DPO."})
    gamma: float = field(default=0.0, metadata={"help": "Weight of attention-aware SFT."})
    beta: float = field(default=0.1, metadata={"help": "DPO's inverse temperature."})
    loss_type: str = field(default="sigmoid", metadata={"help": "Preference loss.", "choices": list(PREFERENCE_LOSSES)})
    label_smoothing: float = field(default=0.0, metadata={"help": "Assumed share of flipped pairs (sigmoid, robust)."})
    attention_weight: float = field(default=0.9, metadata={"help": "λ; 0 gives plain DPO or SFT."})
    attention_threshold: float = field(default=0.75, metadata={"help": "τ: the ratio from which L_att (hinge) is 0."})
    attention_loss: str = field(
        default="hinge",
        metadata={"help": "hinge: max(0, τ - R); log: -log R.", "choices": list(ATTENTION_LOSSES)},
    )
    attention_layers: str = field(
        default="auto",
        metadata={"help": "Zero-based layers of R: a range 14-22, a list 3,5,7, all, or auto (14-22 of 32, scaled)."},
    )
    attention_heads: str | None = field(
        default=None,
        metadata={"help": "File of scripts.discover_heads: R of its best heads (of attention_layers, if given) instead "
                  "of all heads."},
    )  # fmt: skip
    top_heads: int = field(default=TOP, metadata={"help": "How many of the best heads."})

    def __post_init__(self):
        numbers = ("dpo_alpha", "gamma", "attention_weight", "attention_threshold", "beta", "label_smoothing")
        for name in numbers:
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"--{name} {getattr(self, name)} must be a finite number")
        if min(self.dpo_alpha, self.gamma, self.attention_weight) < 0:
            raise ValueError("--dpo_alpha, --gamma and --attention_weight must not be negative")
        if self.dpo_alpha == 0 and self.gamma == 0:
            raise ValueError("--dpo_alpha and --gamma are both 0: there is nothing to train; set one of them above 0")
        if self.beta <= 0:
            raise ValueError(f"--beta {self.beta} must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"--label_smoothing {self.label_smoothing} must be from 0 up to, not including, 0.5")
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            raise ValueError(f"--loss_type {self.loss_type} knows no label smoothing; {' and '.join(SMOOTHED)} do")

    def settings(self) -> LossSettings:
        """The same numbers as `losses.total_loss` takes them."""
        names = LossSettings.__dataclass_fields__
        return LossSettings(**{name: getattr(self, name) for name in names})


@dataclass
class TrainArguments(TrainingArguments):
    """transformers.TrainingArguments with what this trainer needs fixed, and its own few flags."""

    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector, if trained; default: learning_rate."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Check everything, print the plan, load no weights, stop."})
    tokens_per_batch: int = field(
        default=0,
        metadata={"help": "Pack rows of up to so many tokens, as few as a step needs; 0: per_device_train_batch_size "
                  "pairs a row. A step has per_device * accumulation * processes pairs either way."},
    )  # fmt: skip
    reference_cache: str | None = field(
        default=None,
        metadata={"help": "Folder of reference log-probs, filled before the first step; runs on the same weights share "
                  "it. Default: with LoRA none, they are computed at every step; else OUTPUT_DIR/reference."},
    )  # fmt: skip
    flop_utilization: float = field(
        default=0.4, metadata={"help": "Share (0..1) of a GPU's peak that the plan assumes; nothing else reads it."}
    )
    gpu_hour_price: float | None = field(
        default=None, metadata={"help": "Price of a GPU-hour, for the plan; nothing else reads it."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: batches are packed rows."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many optimiser steps."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Off: a non-finite loss ends the run."})

    def __post_init__(self):
        if self.remove_unused_columns:
            raise ValueError("--remove_unused_columns must stay False: a batch is a packed row, not columns")
        for name, only in FIXED.items():
            if getattr(self, name) != only:
                raise ValueError(f"--{name} must stay {only}: which pairs form which step is fixed before the start")
        if not 0 < self.flop_utilization <= 1:
            raise ValueError(f"--flop_utilization {self.flop_utilization}: a share above 0, at most 1")
        self.use_cpu = self.use_cpu or not torch.cuda.is_available()
        if not self.deepspeed:  # the flag's empty string, as a script passes it
            self.deepspeed = None
        elif isinstance(self.deepspeed, str):
            refuse_missing_deepspeed(self.deepspeed)
        self.deepspeed_file = self.deepspeed
        if self.dry_run:
            self.deepspeed = None  # planning needs no process group
        if self.ddp_find_unused_parameters is None:  # every trained weight is in every row: nothing to look for
            self.ddp_find_unused_parameters = False
        if self.activation_checkpointing is None:  # the older name of the same flag, without its warning
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        super().__post_init__()
        if (self.activation_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=true cuts the attention term off from the weights, so that it would train nothing: "
                "leave it out of the checkpointing arguments"
            )

    def accumulate(self, rows: int) -> None:
        """Make so many passes per process and step, also in DeepSpeed's config, which was made from the flags."""
        self.gradient_accumulation_steps = rows
        if self.deepspeed:
            config = self.hf_deepspeed_config.config
            config["gradient_accumulation_steps"] = rows
            config["train_batch_size"] = self.world_size * self.per_device_train_batch_size * rows


def refuse_missing_deepspeed(file: str) -> None:
    """Raises FileNotFoundError where a DeepSpeed config is named that is not there."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"--deepspeed {file}: no such file; scripts/zero2.json is one")


class Parser(HfArgumentParser):
    """argparse, but an error is one line and not the list of all flags."""

    def error(self, message: str):
        """Raises ValueError."""
        raise ValueError(message + "; see --help")


def parse(
    argv: Sequence[str] | None = None,
) -> tuple[ModelArguments, DataArguments, LossArguments, TrainArguments]:
    """The four groups of flags. Raises ValueError with a nearest name for an unknown flag."""
    argv = list(sys.argv[1:] if argv is None else argv)
    groups = (ModelArguments, DataArguments, LossArguments, TrainArguments)
    check_names(argv, [f.name for group in groups for f in fields(group) if f.init])
    parser = Parser(groups, prog="run_dpo", description="Attention-aware DPO and SFT of LLaVA-1.5.", allow_abbrev=False)
    return parser.parse_args_into_dataclasses(argv)


def check_names(argv: Sequence[str], known: Sequence[str]) -> None:
    """Refuse flags that do not exist, or no longer, before argparse complains about anything else."""
    for word in argv:
        name = word[2:].split("=", 1)[0].replace("-", "_")
        if not word.startswith("--") or name in (*known, "help") or name.removeprefix("no_") in known:
            continue
        if name in RETIRED:
            raise ValueError(f"--{name} is a flag of earlier scripts that no longer exists: {RETIRED[name]}")
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"unknown flag --{name}; " + (f"did you mean --{near[0]}?" if near else "see --help"))
