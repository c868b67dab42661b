"""QLoRA: what is passed to transformers and what is refused; with bitsandbytes installed also the real thing."""

import importlib.util
import math
import sys

import pytest
import torch
from transformers.quantizers.quantizers_utils import should_convert_module

from llava.checkpoints import open_checkpoint
from llava.families.llava15 import Llava15
from tests.dialects import make_formats
from tests.test_trainer import one_batch, pairs  # noqa: F401  a fixture
from train.llava_hound_dpo import run_dpo
from train.llava_hound_dpo.arguments import ModelArguments, parse
from train.llava_hound_dpo.model import parameter_table, quantisation, refuse_quantised
from train.llava_hound_dpo.scoring import Scores

NEEDS_BITSANDBYTES = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.fixture
def argv(pairs, checkpoint, tmp_path):  # noqa: F811
    words = ["--model_name_or_path", checkpoint, "--data_path", pairs, "--image_folder", pairs.parent / "images"]
    words += ["--output_dir", tmp_path / "out", "--lora_r", "4", "--lora_alpha", "8", "--disable_tqdm", "True"]
    words += ["--per_device_train_batch_size", "3", "--save_strategy", "no", "--use_cpu", "True"]
    return [str(word) for word in words]


# ---- what is passed


def test_four_bits_are_nf4_with_quantised_constants():
    passed = quantisation(4, Llava15, torch.bfloat16, "cuda:3")
    settings = passed["quantization_config"].to_dict()
    assert passed["device_map"] == {"": "cuda:3"}
    assert settings["load_in_4bit"] and not settings["load_in_8bit"]
    assert (settings["bnb_4bit_quant_type"], settings["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert settings["bnb_4bit_compute_dtype"] == "bfloat16"


def test_eight_bits_and_sixteen():
    settings = quantisation(8, Llava15, torch.bfloat16, "cuda:0")["quantization_config"].to_dict()
    assert settings["load_in_8bit"] and not settings["load_in_4bit"]
    assert quantisation(16, Llava15, torch.bfloat16, "cuda:0") == {}


def test_the_linear_layers_of_the_language_model_are_quantised_and_no_others(model):
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    skipped = quantisation(4, Llava15, torch.float32, "cpu")["quantization_config"].llm_int8_skip_modules
    converted = [name for name in linear if should_convert_module(name, skipped)]
    assert converted == [name for name in linear if "language_model" in name] and len(converted) == 4 * 7


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "stage", "installed", "cuda", "reason"),
    [
        ({"lora_enable": False}, 0, True, True, "quantised weights cannot be trained"),
        ({}, 3, True, True, "--bits 4 with ZeRO-3"),
        ({}, 2, False, True, "needs bitsandbytes, which is not installed"),
        ({}, 2, True, False, "needs a CUDA device"),
        ({}, 2, True, True, None),
        ({"bits": 8}, 0, True, True, None),
        ({"bits": 16, "lora_enable": False}, 3, False, False, None),
    ],
)
def test_combinations(monkeypatch, settings, stage, installed, cuda, reason):
    monkeypatch.setattr("train.llava_hound_dpo.model.is_bitsandbytes_available", lambda: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    arguments = ModelArguments("m", **{"bits": 4, **settings})
    if reason is None:
        refuse_quantised(arguments, stage)
        return
    with pytest.raises(ValueError, match=reason) as caught:
        refuse_quantised(arguments, stage)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", ["2", "5", "32"])
def test_other_numbers_of_bits_are_refused(argv, bits):
    with pytest.raises(ValueError, match="--bits"):
        parse([*argv, "--bits", bits])


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_the_command_ends_in_one_line_before_any_weight_is_loaded(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_dpo", *argv, "--bits", "4"])
    monkeypatch.setattr(run_dpo, "load_policy", None)  # calling it would raise
    with pytest.raises(SystemExit) as ended:
        run_dpo.main()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert ended.value.code == 2 and line.startswith("error: --bits 4 needs ")


# ---- another experiment, another reference


def read(*words):
    arguments = parse(words)
    return arguments, run_dpo.read_inputs(*arguments)


def test_bits_are_part_of_the_identity(argv):
    found = [run_dpo.describe_run(*arguments, inputs)["bits"]
             for arguments, inputs in (read(*argv), read(*argv, "--bits", "4"))]  # fmt: skip
    assert found == [16, 4]


def test_a_reference_cache_of_other_bits_is_refused(argv, tmp_path):
    cache = ("--reference_cache", str(tmp_path / "cache"))
    _, inputs = read(*argv, *cache)
    inputs.reference.append(inputs.train[:1], Scores(*torch.zeros(4, 1)))
    with pytest.raises(ValueError, match=r"precision float32 computed in float32 there, 4 bits and float32"):
        read(*argv, *cache, "--bits", "4")


# ---- the real thing, on the CPU too


@pytest.fixture
def trainer(argv):
    def make(*words):
        arguments, inputs = read(*argv, *words)
        model, _, loss, args = arguments
        policy = run_dpo.load_policy(inputs.checkpoint, model, args)
        return run_dpo.build_trainer(policy, model, loss, args, inputs, {})

    return make


@NEEDS_BITSANDBYTES
def test_the_base_is_in_four_bits_and_only_the_adapter_is_trained(trainer):
    import bitsandbytes

    policy = trainer("--bits", "4").model
    quantised = {n for n, module in policy.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(quantised) == 28 and all("language_model" in name for name in quantised)
    assert all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)
    others = {p.dtype for n, p in policy.named_parameters() if not any(f"{q}." in f"{n}." for q in quantised)}
    assert others == {torch.float32}
    lora = 4 * 4 * (4 * 256 + 3 * 512)
    rows = {line.split()[0]: line.split() for line in parameter_table(policy, Llava15).splitlines()[1:]}
    assert rows["language_model"][2] == f"{lora:,}"
    full = trainer().model  # packed weights are counted as what they stand for
    same = {line.split()[0]: line.split() for line in parameter_table(full, Llava15).splitlines()[1:]}
    assert rows["language_model"][1] == same["language_model"][1]


@NEEDS_BITSANDBYTES
def test_an_original_checkpoint_is_quantised_to_the_same(tmp_path):
    """Weight for weight: layers of this width are too narrow for a forward of bitsandbytes on a CPU."""
    formats = make_formats(tmp_path)
    four_bits = quantisation(4, Llava15, torch.float32, "cpu")
    ours, theirs = (
        dict(open_checkpoint(str(path)).load(**four_bits).named_parameters())
        for path in (formats.original, formats.llava_hf)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    packed = [name for name, parameter in ours.items() if parameter.dtype == torch.uint8]
    assert len(packed) % 7 == 0 and packed and all("language_model" in name for name in packed)


@NEEDS_BITSANDBYTES
@pytest.mark.parametrize("bits", ["4", "8"])
def test_training_on_a_quantised_base(trainer, bits):
    """The reference is the quantised base: ln 2 exactly at the start; then the loss falls."""
    ours = trainer("--bits", bits, "--attention_weight", "0", "--max_steps", "4", "--learning_rate", "3e-3",
                   "--gradient_checkpointing", "True", "--lr_scheduler_type", "constant")  # fmt: skip
    ours.train()
    losses = [log["losses/dpo"] for log in ours.state.log_history if "losses/dpo" in log]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < math.log(2) - 0.01


@NEEDS_BITSANDBYTES
def test_checkpointing_changes_no_gradient_and_the_attention_term_has_one(trainer):
    def gradients(checkpointing):
        ours = trainer("--bits", "4", "--attention_threshold", "1", "--gradient_checkpointing", checkpointing)
        ours.model.train()
        ours.compute_loss(ours.model, one_batch(ours)).backward()
        return {n: p.grad for n, p in ours.model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients("False"), gradients("True")
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    assert any(gradient.abs().max() > 0 for name, gradient in plain.items() if "q_proj" in name)


@NEEDS_BITSANDBYTES
def test_the_cached_reference_is_that_of_the_quantised_base(trainer, tmp_path):
    cached = trainer("--bits", "4", "--reference_cache", str(tmp_path / "cache"))
    dataset = cached.train_dataset
    cached.fill_reference(dataset, cached.reference.missing(dataset.pairs))
    whole, batch = trainer(), one_batch(cached)
    stored = cached._reference(cached.model, batch, {}, dataset)
    fly, other = (
        ours._reference(ours.model, batch, {"pixels": batch["pixels"]}, None)
        for ours in (trainer("--bits", "4"), whole)
    )
    torch.testing.assert_close(stored.chosen, fly.chosen, atol=1e-4, rtol=0)
    assert (stored.chosen - other.chosen).abs().max() > 1e-2
