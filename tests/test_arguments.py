"""The command line of training: defaults of the design, and one line for every mistake."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from llava.command_line import ABOVE_0
from train.llava_hound_dpo import trainer_flags
from train.llava_hound_dpo.arguments import (
    RETIRED,
    DataArguments,
    LossArguments,
    ModelArguments,
    TrainArguments,
    parse,
)
from train.llava_hound_dpo.trainer_flags import RANGES, REFUSED, WORKS

REQUIRED = {"model_name_or_path": "m", "data_path": "train.json", "image_folder": "images.zip", "output_dir": "out"}
GROUPS = (ModelArguments, DataArguments, LossArguments, TrainArguments)


def parsed(*flags, without=()):
    required = [word for name, value in REQUIRED.items() if name not in without for word in (f"--{name}", value)]
    return parse([*required, *flags])


def refused(*flags, without=()):
    """The message with which the flags are refused; it is one line."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        parsed(*flags, without=without)
    assert "\n" not in str(caught.value), str(caught.value)
    return str(caught.value)


# ---- defaults and values


def test_defaults_are_those_of_the_design():
    model, data, loss, args = parsed()
    assert (loss.dpo_alpha, loss.gamma, loss.beta) == (1.0, 0.0, 0.1)
    assert (loss.attention_threshold, loss.attention_weight, loss.attention_loss) == (0.75, 0.9, "hinge")
    assert (loss.loss_type, loss.label_smoothing, loss.attention_layers) == ("sigmoid", 0.0, "auto")
    assert (model.lora_enable, model.lora_r, model.lora_alpha, model.lora_dropout) == (True, 128, 256, 0.0)
    assert loss.attention_rows == "first"
    assert loss.layers(32) == {*range(32)} and parsed("--attention_layers", "middle")[2].layers(32) == {*range(14, 23)}
    assert model.freeze_mm_mlp_adapter is True
    assert (data.image_aspect_ratio, data.overlong, data.model_max_length) == ("pad", "error", 4096)
    assert args.dry_run is False and args.remove_unused_columns is False and args.mm_projector_lr is None


def test_values_reach_their_group():
    flags = "--beta 0.2 --lora_r=8 --freeze_mm_mlp_adapter False --image_aspect_ratio crop --mm_projector_lr 2e-5"
    model, data, loss, args = parsed(*flags.split(), "--learning_rate", "5e-5", "--seed", "7")
    assert (loss.beta, model.lora_r, model.freeze_mm_mlp_adapter) == (0.2, 8, False)
    assert (data.image_aspect_ratio, args.mm_projector_lr, args.learning_rate, args.seed) == ("crop", 2e-5, 5e-5, 7)
    assert (model.model_name_or_path, data.data_path) == ("m", "train.json")
    assert (data.image_folder, args.output_dir) == ("images.zip", "out")


def test_the_last_of_two_equal_flags_wins():
    assert parsed("--dpo_alpha", "1", "--dpo_alpha", "0.5")[2].dpo_alpha == 0.5


def test_settings_of_the_loss_are_the_flags():
    settings = parsed("--dpo_alpha", "0", "--gamma", "2", "--attention_weight", "0.3")[2].settings()
    assert (settings.dpo_alpha, settings.gamma, settings.attention_weight) == (0.0, 2.0, 0.3)


def test_gradient_checkpointing_by_its_older_name():
    """Given either way it is on or off, and transformers itself is not asked to warn about it."""
    for name in ("--gradient_checkpointing", "--activation_checkpointing"):
        for given in (True, False):
            args = parsed(name, str(given))[3]
            assert args.activation_checkpointing is given and not args.chooses_checkpointing
    for flags in ([], ["--gradient_checkpointing", "auto"]):
        args = parsed(*flags)[3]
        assert args.activation_checkpointing is True and args.chooses_checkpointing
    assert TrainArguments(output_dir="out", gradient_checkpointing=False).activation_checkpointing is False


@pytest.mark.parametrize("group", GROUPS[:3])
def test_every_flag_of_ours_has_a_help_text(group):
    assert all(len(f.metadata.get("help", "")) > 5 for f in dataclasses.fields(group))


def test_alpha_follows_the_rank_unless_it_is_given():
    assert parsed("--lora_r", "8")[0].lora_alpha == 16
    assert parsed("--lora_r", "8", "--lora_alpha", "8")[0].lora_alpha == 8
    assert parsed("--lora_r", "8")[0].trained == "LoRA of rank 8, scaled by 16 / 8 = 2"
    assert parsed("--lora_enable", "False")[0].trained == "the language model"


def test_rank_0_points_at_full_fine_tuning():
    assert "--lora_enable False" in refused("--lora_r", "0")


def test_the_help_has_our_own_flags_first_in_groups(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n{name}:") for name in ("Model", "Data", "Loss", "Run", "transformers.TrainingArguments")]
    own, inherited = text.index("--dry_run"), text.index("--learning_rate")
    assert places == sorted(places) and places[3] < own < places[4] < inherited
    assert len(text[: places[0]].splitlines()) < 10


def test_help_ends_normally(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0 and "--attention_weight" in capsys.readouterr().out


# ---- names


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--dpo_alfa", "dpo_alpha"), ("--image_foldr", "image_folder"), ("--learning_rat", "learning_rate")],
)
@pytest.mark.parametrize("form", ["{} 1", "{}=1"])
def test_unknown_flag_suggests_the_nearest(typed, meant, form):
    assert f"did you mean --{meant}?" in refused(*form.format(typed).split())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lora_rank", "lora_r"),
        ("attention_lambda", "attention_weight"),
        ("lambda", "attention_weight"),
        ("alpha", "dpo_alpha"),
        ("tau", "attention_threshold"),
    ],
)
def test_what_others_call_a_flag_is_known(typed, meant):
    assert f"did you mean --{meant}?" in refused(f"--{typed}", "1")


def test_unknown_flag_like_no_other():
    assert "unknown flag --xyzzy" in refused("--xyzzy")


def test_an_unknown_flag_comes_before_a_missing_one():
    with pytest.raises(ValueError, match="did you mean --gamma"):
        parse(["--gama", "1"])


def test_a_value_without_flag_is_refused():
    assert "stray" in refused("stray")


@pytest.mark.parametrize("name", RETIRED)
def test_retired_flags_say_what_to_do(name):
    message = refused(f"--{name}", "1")
    assert message.startswith(f"--{name} ") and RETIRED[name] in message and "no longer exists" in message


def test_the_flags_that_users_know_from_before_are_retired_or_alive():
    known = {f.name for group in GROUPS for f in dataclasses.fields(group)}
    assert not known & set(RETIRED)
    assert {"X", "training_modal", "video_folder", "version", "mm_use_x_start_end"} <= set(RETIRED)
    assert {"mm_projector_lr", "model_max_length", "deepspeed", "bf16", "lora_alpha"} <= known


# ---- values


@pytest.mark.parametrize("name", ["model_name_or_path", "data_path", "image_folder"])
def test_a_missing_required_flag_is_named(name):
    assert f"--{name}" in refused(without=(name,))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--dpo_alpha 0 --gamma 0", "nothing to train"),
        ("--dpo_alpha 0", "nothing to train"),  # gamma is 0 by default
        ("--dpo_alpha -1", "--dpo_alpha"),
        ("--gamma -0.1", "--gamma"),
        ("--attention_weight -0.9", "--attention_weight"),
        ("--beta 0", "--beta"),
        ("--beta -0.1", "--beta"),
        ("--dpo_alpha much", "--dpo_alpha"),
        ("--dpo_alpha nan", "--dpo_alpha"),
        ("--beta nan", "--beta"),
        ("--attention_threshold nan", "--attention_threshold"),
        ("--attention_threshold 2:0.85,default:0.75", "--attention_threshold"),
        ("--attention_carry True", "b4cba4d"),
        ("--attention_schedule linear_decay", "b4cba4d"),
        ("--attention_warmup_share 0.1", "b4cba4d"),
        ("--lora_r 1.5", "--lora_r"),
        ("--lora_r -8", "--lora_r"),
        ("--lora_alpha 0", "--lora_alpha"),
        ("--lora_dropout nan", "--lora_dropout"),
        ("--learning_rate nan", "--learning_rate"),
        ("--learning_rate -1e-5", "--learning_rate"),
        ("--num_train_epochs inf", "--num_train_epochs"),
        ("--max_steps 1e14", "--max_steps"),
        ("--warmup_ratio 1", "--warmup_ratio"),
        ("--warmup_ratio nan", "--warmup_ratio"),
        ("--warmup_ratio 0.1 --warmup_steps 5", "not both"),
        ("--lora_r 100000000000", "--lora_r"),
        ("--group_by_length True", "no longer exists"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps"),
        ("--model_max_length 0", "--model_max_length"),
        ("--top_heads 0", "--top_heads"),
        ("--label_smoothing 0.5", "--label_smoothing"),
        ("--label_smoothing -0.1", "--label_smoothing"),
        ("--label_smoothing 0.1 --loss_type hinge", "hinge knows no label smoothing"),
        ("--label_smoothing 0.1 --loss_type ipo", "ipo knows no label smoothing"),
        ("--loss_type dpo", "sigmoid"),
        ("--attention_loss square", "hinge"),
        ("--image_aspect_ratio square", "crop"),
        ("--overlong cut", "drop"),
        ("--check_images never", "header"),
        ("--eval_split 1", "--eval_split"),
        ("--eval_split -0.1", "--eval_split"),
        ("--eval_split 0.1 --eval_data_path e.json", "--eval_data_path"),
        ("--deepspeed nowhere.json", "scripts/zero2.json"),
        ("--learning_rate", "--learning_rate"),
        ("--bits 5", "--bits"),
        ("--gradient_checkpointing perhaps", "True, False or auto"),
        ("--flop_utilization 0", "--flop_utilization"),
        ("--flop_utilization 1.5", "--flop_utilization"),
    ],
)
def test_bad_values_are_one_line(flags, reason):
    assert reason in refused(*flags.split())


NUMERIC = (int, float, int | None, float | None)
NUMBERS = [field.name for group in GROUPS for field in dataclasses.fields(group) if field.type in NUMERIC]
FREE = {"attention_threshold", "local_rank"}  # below 0 as well: -1 is no launcher


@pytest.mark.parametrize("name", sorted(set(NUMBERS) - set(REFUSED)))
def test_numbers_without_meaning_are_refused_before_anything_is_read(name):
    """Of every numeric flag, ours and transformers': no number, infinity, and what lies below its range."""
    for value in ["nan", "inf", "-inf", *(["-2"] if name not in FREE else [])]:
        assert f"--{name}" in refused(f"--{name}={value}")
    least = {**RANGES, "mm_projector_lr": (0, None)}.get(name, (0, None))[0]
    if least in (1, ABOVE_0):
        assert f"--{name} 0" in refused(f"--{name}", "0")


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_of_transformers_that_does_nothing_or_harm_is_refused_with_the_reason(name):
    field = next(f for f in dataclasses.fields(TrainArguments) if f.name == name)
    args = TrainArguments.__new__(TrainArguments)
    for other in dataclasses.fields(TrainArguments):
        default = other.default if other.default is not dataclasses.MISSING else other.default_factory()
        setattr(args, other.name, default)
    trainer_flags.refuse(args)
    setattr(args, name, not field.default if isinstance(field.default, bool) else 5)
    with pytest.raises(ValueError, match=f"^--{name} .* must stay .*: ") as caught:
        trainer_flags.refuse(args)
    assert REFUSED[name] in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        "--neftune_noise_alpha 5", "--label_smoothing_factor 0.1", "--torch_compile True", "--push_to_hub True",
        "--auto_find_batch_size True", "--train_sampling_strategy group_by_length", "--save_only_model True",
        "--resume_from_checkpoint out/checkpoint-1", "--fsdp full_shard", "--use_liger_kernel",
    ],
)  # fmt: skip
def test_such_flags_from_the_command_line(flags):
    assert "must stay" in refused(*flags.split())


def test_every_field_of_the_installed_transformers_is_sorted_once():
    """A version with a new field fails here: read what it does, then sort it."""
    fields = {f.name for f in dataclasses.fields(TrainingArguments)}
    assert not WORKS & set(REFUSED)
    assert fields == WORKS | set(REFUSED), fields ^ (WORKS | set(REFUSED))
    assert set(RANGES) <= WORKS


def test_warmup_ratio_is_the_share_of_steps_over_which_the_rate_rises():
    """The flag of every LLaVA script, whether transformers has it or not."""
    assert parsed("--warmup_ratio", "0.03")[3].get_warmup_steps(1000) == 30
    assert parsed("--warmup_steps", "7")[3].get_warmup_steps(1000) == 7


@pytest.mark.parametrize(
    ("has_bf16", "asked", "dtype"),
    [(True, "bf16", "bfloat16"), (False, "bf16", "float16"), (False, "fp16", "float16"), (False, None, "float32")],
)
def test_a_card_without_bfloat16_computes_in_float16_and_says_so(monkeypatch, caplog, has_bf16, asked, dtype):
    """V100, T4, RTX 8000: torch emulates it there, and says that it is supported unless it is asked without that."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or has_bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    args = SimpleNamespace(bf16=asked == "bf16", fp16=asked == "fp16", use_cpu=False)
    with caplog.at_level("INFO"):
        TrainArguments._choose_precision(args)
    assert str(TrainArguments.dtype.fget(args)) == f"torch.{dtype}"
    assert caplog.messages == ["Tesla V100 has no bfloat16: computing in float16"] * (asked == "bf16" and not has_bf16)


@pytest.mark.parametrize(
    "content", ["[]", "null", "3", "{", *(f'{{"zero_optimization": {zero}}}' for zero in (
        "[]", "null", '{"stage": 7}', '{"stage": "2"}', '{"offload_param": 1}', '{"stage3_max_live_parameters": {}}',
    ))]
)  # fmt: skip
def test_a_file_that_is_no_deepspeed_config_is_one_line(tmp_path, content):
    (tmp_path / "zero.json").write_text(content)
    assert "zero.json" in refused("--deepspeed", str(tmp_path / "zero.json"))


def test_bars_are_drawn_on_a_terminal_only(monkeypatch):
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda answer=is_terminal: answer, raising=False)
        assert parsed()[3].disable_tqdm is not is_terminal


@pytest.mark.parametrize("kind", ["sigmoid", "robust"])
def test_label_smoothing_with_the_losses_that_know_it(kind):
    assert parsed("--label_smoothing", "0.1", "--loss_type", kind)[2].label_smoothing == 0.1


@pytest.mark.parametrize("flag", ["gradient", "activation"])
def test_reentrant_checkpointing_is_refused(flag):
    reentrant = [f"--{flag}_checkpointing", "True", f"--{flag}_checkpointing_kwargs", '{"use_reentrant": true}']
    assert "use_reentrant" in refused(*reentrant)
    parsed(*[word.replace("true", "false") for word in reentrant])


@pytest.mark.parametrize("argument", ["", None])
def test_no_deepspeed(argument):
    assert TrainArguments(output_dir="out", deepspeed=argument).deepspeed is None


def test_a_dry_run_remembers_the_deepspeed_file_but_starts_no_process_group():
    args = parsed("--dry_run", "True", "--deepspeed", "scripts/zero2.json")[3]
    assert args.deepspeed is None and args.deepspeed_file == "scripts/zero2.json"
