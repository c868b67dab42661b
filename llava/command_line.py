"""Command lines from dataclasses: one style of flags for every command, grouped help, errors in one line.

A field is a flag; its metadata is what argparse takes (`help`, `choices`, `aliases`). A class attribute
`_argument_group_name` is the heading of its fields in `--help`, `_inherited_group_name` of those of its base class.
"""

import copy
import dataclasses
import difflib
import math
import sys
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser

ABOVE_0, BELOW_1 = math.ulp(0.0), math.nextafter(1.0, 0.0)  # limits that leave out 0, or 1
SYNONYMS = {  # what a flag is called elsewhere: words are for the first of these flags that a command has
    "model_name_or_path": "model model_path model_name model_id checkpoint adapter adapter_path pretrained",
    "base_model": "base model_base",
    "image_tower": "vision_tower",
    "data_path": "data dataset data_file train_file dataset_name questions question_file pairs instructions",
    "questions": "data data_path dataset question_file",
    "pairs": "data data_path dataset train_file",
    "source": "data data_path dataset",
    "image_folder": "images image_dir images_dir image_path image_root",
    "output": "output_dir output_path output_file out out_dir save_dir save_path answers_file",
    "output_dir": "output output_path out out_dir save_dir save_path",
    "max_new_tokens": "max_tokens max_length",
    "model_max_length": "max_tokens max_length max_seq_length cutoff_len",
    "batch_size": "batch bs bsz per_device_eval_batch_size per_device_train_batch_size",
    "per_device_train_batch_size": "batch_size batch bs bsz train_batch_size micro_batch_size",
    "gradient_accumulation_steps": "grad_accum accumulation gradient_accumulation accumulate_grad_batches",
    "num_workers": "workers dataloader_num_workers",
    "dataloader_num_workers": "workers num_workers",
    "jobs": "workers num_workers",
    "num_train_epochs": "epochs epoch num_epochs",
    "max_steps": "steps num_steps train_steps",
    "learning_rate": "lr rate",
    "lora_r": "lora_rank rank r lora_dim",
    "lora_alpha": "lora_scale",
    "dpo_alpha": "alpha dpo_weight",
    "gamma": "sft_weight",
    "attention_weight": "attention_lambda lambda attention_loss_weight attn_weight",
    "attention_threshold": "tau attention_tau threshold",
    "attention_layers": "layers layer attn_layers",
    "attention_heads": "heads head attn_heads",
    "dtype": "torch_dtype precision bf16 fp16",
    "num_beams": "beams beam_size",
}


class _Formatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Defaults in the help where there are any, one spelling of each flag, and the description as it is written."""

    def _get_help_string(self, action: Action) -> str:
        if action.required:
            return f"{action.help} (required)"
        return action.help if action.default in (None, []) else super()._get_help_string(action)

    def _format_action_invocation(self, action: Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if "-" not in name[2:]]
        return super()._format_action_invocation(shown)


class Parser(HfArgumentParser):
    """HfArgumentParser, but an error is a ValueError and not the list of all flags."""

    def error(self, message: str):
        """Raises ValueError."""
        raise ValueError(message + "; see --help")

    def _add_dataclass_arguments(self, dtype: type) -> None:
        """What a dataclass inherits has a heading of its own in the help if the class names one."""
        super()._add_dataclass_arguments(dtype)
        for action in self._actions:
            if action.option_strings[0].startswith("--no_"):  # `--NAME False` says the same
                action.help = SUPPRESS
        if hasattr(dtype, "_inherited_group_name"):
            own, inherited = self._action_groups[-1], self.add_argument_group(dtype._inherited_group_name)
            inherited._group_actions = [a for a in own._group_actions if a.dest not in dtype.__annotations__]
            own._group_actions = [a for a in own._group_actions if a.dest in dtype.__annotations__]


def flag(help: str, default: Any = dataclasses.MISSING, **metadata: Any) -> Any:
    """A field of a command's dataclass; without a default the flag is required."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def parse(
    groups: Sequence[type], description: str | None, argv: Sequence[str] | None = None,
    retired: Mapping[str, str] | None = None, usage: str | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """One instance of each dataclass, from the words of the command line.

    `retired`: flags that no longer exist, and what to do instead; `usage`: the help's first line, where a list of all
    flags is too long for one. Raises ValueError, with the nearest name for an unknown flag.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(groups, description=description, usage=usage, formatter_class=_Formatter, allow_abbrev=False)
    _check_names(argv, list(parser._option_string_actions), retired or {})
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


def check(groups: Sequence[type], argv: Sequence[str], only_parsed: Sequence[type] = ()) -> Namespace:
    """Raises ValueError for words that `parse` would not take.

    Dataclasses that do more when made than look at their fields are `only_parsed`: their fields are as given.
    """
    parser = Parser((*groups, *only_parsed), allow_abbrev=False)
    _check_names(argv, list(parser._option_string_actions), {})
    found = parser.parse_args(argv)
    for group in groups:
        group(**{own.name: getattr(found, own.name) for own in dataclasses.fields(group) if own.init})
    return found


def command(argv: Sequence[str] | None, names: Sequence[str], description: str | None) -> tuple[str, list[str]]:
    """The first word, one of `names`, and the others, for a command of several. Raises ValueError."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in names:
        return argv[0], argv[1:]
    if argv and argv[0] in ("-h", "--help"):
        sys.stdout.write(f"{description}\ncommands: {', '.join(names)}; each has --help\n")
        sys.exit(0)
    raise ValueError(f"the first word must be one of {', '.join(names)}" + (f", not {argv[0]!r}" if argv else ""))


def check_choices(settings: Any) -> None:
    """Raises ValueError for a value of a dataclass that is none of its flag's choices: from Python, not the parser's.

    True and False of a flag that takes them as words become those.
    """
    for field in dataclasses.fields(settings):
        choices, value = field.metadata.get("choices"), getattr(settings, field.name)
        if isinstance(value, bool) and choices and str(value) in choices:
            setattr(settings, field.name, str(value))
        elif choices and value is not None and value not in choices:
            raise ValueError(f"--{field.name} {value!r}: must be one of {', '.join(map(str, choices))}")


def check_numbers(settings: Any, **ranges: tuple[float | None, float | None]) -> None:
    """Raises ValueError for a number of a dataclass that is not finite, or outside of (least, most); None: no limit.

    Of a list, for any of its numbers.
    """
    for name, (least, most) in ranges.items():
        low, high = -math.inf if least is None else least, math.inf if most is None else most
        found = getattr(settings, name)
        for value in found if isinstance(found, list | tuple) else [found]:
            if value is None or (low <= value <= high and abs(value) != math.inf):
                continue
            limits = ["above 0" if least == ABOVE_0 else f"at least {least}"] * (least is not None)
            limits += ["below 1" if most == BELOW_1 else f"at most {most}"] * (most is not None)
            raise ValueError(f"--{name} {value}: must be {' and '.join(limits) or 'a finite number'}")


def _check_names(argv: Sequence[str], known: Sequence[str], retired: Mapping[str, str]) -> None:
    """Refuse flags that do not exist, or no longer, before argparse complains about anything else."""
    for word in argv:
        given = word.split("=", 1)[0]
        if not given.startswith("--") or given in known or given == "--":
            continue
        name = given[2:].replace("-", "_")
        if name in retired:
            raise ValueError(f"--{name} is a flag of earlier scripts that no longer exists: {retired[name]}")
        names = [option[2:] for option in known if option.startswith("--") and not option.startswith("--no_")]
        near = [own for own, others in SYNONYMS.items() if own in names and name in others.split()]
        near = near or difflib.get_close_matches(name, names, n=1)
        raise ValueError(f"unknown flag --{name[:60]}; " + (f"did you mean --{near[0]}?" if near else "see --help"))
