"""The plan of `--dry_run`: numbers against hand computation, without any weight."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llava.families.llava15 import Llava15
from tests.conftest import preference
from tests.test_costs import config_7b  # noqa: F401  a fixture
from train.llava_hound_dpo.arguments import DataArguments, LossArguments, ModelArguments, TrainArguments
from train.llava_hound_dpo.batches import num_steps
from train.llava_hound_dpo.data import Pair
from train.llava_hound_dpo.model import build_on_meta, count_parameters, parameter_table
from train.llava_hound_dpo.plan import describe_training, plan, shape_of, world_size
from train.llava_hound_dpo.run_dpo import read_inputs

ROOT = Path(__file__).resolve().parent.parent

# LLaVA-1.5-7B by hand: width 4096, feed-forward 11008, 32 blocks, 32064 tokens.
LANGUAGE_MODEL = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + 32064 * 4096
HEAD = 32064 * 4096
PROJECTOR = (1024 * 4096 + 4096) + (4096 * 4096 + 4096)
# CLIP-L/336: class token, patches without bias, positions, two norms; 24 blocks of attention, feed-forward, norms.
VISION = 1024 + 3 * 14 * 14 * 1024 + 577 * 1024 + 4 * 1024 + 24 * (
    4 * (1024 * 1024 + 1024) + (1024 * 4096 + 4096) + (4096 * 1024 + 1024) + 4 * 1024
)  # fmt: skip
ALL = LANGUAGE_MODEL + HEAD + PROJECTOR + VISION
LORA_128 = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))  # A and B of seven layers a block


# ---- parameters


@pytest.mark.parametrize(
    ("settings", "added", "trained"),
    [
        ({}, LORA_128, LORA_128),
        ({"lora_r": 16}, LORA_128 // 8, LORA_128 // 8),
        ({"freeze_mm_mlp_adapter": False}, LORA_128 + PROJECTOR, LORA_128 + PROJECTOR),  # beside the frozen original
        ({"lora_enable": False}, 0, LANGUAGE_MODEL + HEAD),
        ({"lora_enable": False, "freeze_mm_mlp_adapter": False}, 0, LANGUAGE_MODEL + HEAD + PROJECTOR),
    ],
    ids=["default", "rank 16", "projector", "full", "full and projector"],
)
def test_parameters_of_7b(config_7b, settings, added, trained):  # noqa: F811
    assert round(ALL / 1e9, 2) == 7.06 and LORA_128 == 319_815_680
    model = build_on_meta(config_7b, ModelArguments("m", **settings))
    assert count_parameters(model) == (ALL + added, trained)
    assert all(p.device.type == "meta" for p in model.parameters())


def test_table_of_7b(config_7b):  # noqa: F811
    """LoRA of the language model only; the vision tower and the head train nothing."""
    rows = {
        line.split()[0]: [int(word.replace(",", "")) for word in line.split()[1:3]]
        for line in parameter_table(build_on_meta(config_7b, ModelArguments("m")), Llava15).splitlines()[1:]
    }
    assert rows["vision_tower"] == [VISION, 0] and rows["multi_modal_projector"] == [PROJECTOR, 0]
    assert rows["language_model"] == [LANGUAGE_MODEL + LORA_128, LORA_128] and rows["lm_head"] == [HEAD, 0]


# ---- steps and tokens


@pytest.mark.parametrize(
    ("pairs", "per_device", "accumulation", "world", "steps"),
    [
        (27_000, 1, 32, 2, 422),  # 13,500 micro-batches a process, 421.9 times 32
        (64, 1, 32, 2, 1),
        (65, 1, 32, 2, 2),  # 33 micro-batches a process
        (10, 4, 1, 1, 3),
        (10, 4, 2, 1, 2),
        (10, 4, 1, 2, 2),  # three micro-batches for two processes
        (3, 8, 32, 2, 1),
    ],
)
def test_steps_per_epoch(pairs, per_device, accumulation, world, steps):
    assert num_steps(pairs, per_device * accumulation * world) == steps


@pytest.mark.parametrize(("with_rejected", "tokens"), [(True, 1203), (False, 1193)])
def test_tokens_of_a_packed_row(with_rejected, tokens):
    """Prompt of 40 ids, two of them images of 576: 38 + 1152 = 1190. Branches repeat its last token and feed all but
    the last token of their answers, so an answer of n tokens takes n rows: 1189 + 4 (+ 10)."""
    pair = Pair(SimpleNamespace(images=("a", "b")), [1] * 40, [1] * 4, [[1] * 10], 2 * 576, (577, 577))
    shape = shape_of(pair, with_rejected)
    assert shape.tokens == tokens and shape.answers == tokens - 1189
    assert shape.image_tokens == 1152 and shape.patches == (577, 577)


def test_world_size(monkeypatch):
    for name in ("WORLD_SIZE", "NPROC", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)
    assert world_size() == max(1, torch.cuda.device_count())
    monkeypatch.setenv("NPROC", "4")
    assert world_size() == 4
    monkeypatch.setenv("SLURM_NNODES", "3")
    assert world_size() == 12
    monkeypatch.setenv("WORLD_SIZE", "2")  # a launcher knows best
    assert world_size() == 2


# ---- the text


def dry(checkpoint, data, **settings):
    """(arguments, inputs) of a dry run on what `data` wrote."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 4} | settings
    loss = {name: settings.pop(name) for name in ("dpo_alpha", "gamma", "attention_gate") if name in settings}
    arguments = (
        ModelArguments(str(checkpoint), lora_r=8, lora_alpha=16),
        DataArguments(str(data.folder / "train.json"), str(data.images), eval_split=settings.pop("eval_split", 0)),
        LossArguments(**loss),
        TrainArguments(output_dir=str(data.folder / "out"), dry_run=True, use_cpu=True, **settings),
    )
    return arguments, read_inputs(*arguments)


def text_of(arguments, inputs):
    model, _, loss, args = arguments
    text = plan(model, loss, args, inputs)
    return {line.split()[0]: re.sub(r"\s+", " ", line.strip()) for line in text.splitlines()}


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")


def test_text_of_a_tiny_run(checkpoint, data, one_process):
    data([preference(n, 1 + n % 3, image_type=None if n % 3 else "single") for n in range(20)])
    arguments, inputs = dry(checkpoint, data, eval_split=0.1)
    rows = text_of(arguments, inputs)
    assert rows["model"].endswith(checkpoint) and rows["output"].endswith("out")
    assert rows["pairs"] == "pairs 18 to train on, 2 held out, 0 dropped"
    assert rows["batch"] == "batch 6 pairs = 2 x 3 accumulated x 1 processes"
    assert rows["steps"] == "steps 3 per epoch, 12 in all"  # 9 micro-batches in threes, 4 epochs
    assert rows["loss"] == "loss 1 x (dpo + 0.1 x end + 0.9 x attention) + 0 x (sft + 0.9 x attention)"
    for way, dpo in (("kept", "dpo"), ("left_out", "dpo without the end token"), ("likelihood", "dpo + 0.2 x end")):
        loss = replace(arguments[2], answer_end=way, answer_end_weight=0.2)
        found = describe_training(arguments[0], loss, arguments[3], inputs)["loss"]
        assert found == f"1 x ({dpo} + 0.9 x attention) + 0 x (sft + 0.9 x attention)"
    assert rows["images"].endswith("36 tokens each")
    # The miniature: 4 blocks of width 128 and feed-forward 384, LoRA of rank 8 on seven layers.
    lora = 4 * 8 * (4 * (128 + 128) + 3 * (128 + 384))
    assert rows["language_model"].split()[2] == f"{lora:,}" and rows["vision_tower"].split()[2] == "0"


def test_tokens_of_the_longest_batch(checkpoint, data, one_process):
    """Two rows of the longest pairs, each prompt once with 36 tokens an image; the rejected for DPO or a gate."""
    data([preference(n, n + 1, 1, image_type="sequence") for n in range(4)])
    sft = {"dpo_alpha": 0.0, "gamma": 1.0}
    for weights, answers in (({}, 2), (sft, 1), (sft | {"attention_gate": "preferred"}, 2)):
        arguments, inputs = dry(checkpoint, data, **weights)
        long = inputs.train[2:]
        wanted = sum(len(p.prompt) - 1 + 35 * len(p.record.images) + answers * len(p.chosen) for p in long)
        assert all([len(p.chosen)] == [*map(len, p.rejected)] for p in long)
        rows = text_of(arguments, inputs)
        assert f"({wanted:,} tokens)" in rows["memory"] and ("none" in rows["reference"]) == bool(weights)
        assert sum(inputs.batches.lengths[2:]) == wanted


def test_the_batch_is_what_a_step_really_has(checkpoint, data, one_process):
    """7 pairs in steps of at most 6 are two steps, of 3 and of 4."""
    data([preference(n) for n in range(7)])
    row = text_of(*dry(checkpoint, data))["batch"]
    assert row == "batch 3 or 4 pairs, of at most 6 = 2 x 3 accumulated x 1 processes"


def test_max_steps_overrides_epochs(checkpoint, data, one_process):
    data([preference(n) for n in range(8)])
    assert text_of(*dry(checkpoint, data, max_steps=7))["steps"].endswith("7 in all")


def test_the_zero_stage_is_in_the_plan(checkpoint, data, one_process):
    data([preference(n) for n in range(4)])
    rows = text_of(*dry(checkpoint, data, deepspeed=str(ROOT / "scripts/zero3.json")))
    assert "for ZeRO 3;" in rows["memory"] and "of the CPU's" not in rows["memory"]
    assert "from a cache" in rows["reference"] and "by default under ZeRO-3" in rows["reference"]
    rows = text_of(*dry(checkpoint, data, deepspeed=str(ROOT / "scripts/zero3_offload.json")))
    assert "of the CPU's" in rows["memory"] and "for 1 on this node" in rows["host"]


def test_the_reference_and_what_of_it_is_cached(checkpoint, data, one_process, tmp_path):
    data([preference(n) for n in range(4)])
    assert "at every step" in text_of(*dry(checkpoint, data))["reference"]
    cached = dry(checkpoint, data, reference_cache=str(tmp_path / "cache"))
    row = text_of(*cached)["reference"]
    assert "from a cache, filled before the first step" in row
    assert row.endswith(f"0 of 4 pairs in {tmp_path / 'cache'}, 4 to compute (4 never computed)")
    assert not (tmp_path / "cache").exists()  # a plan writes nothing
    assert "none" in text_of(*dry(checkpoint, data, dpo_alpha=0.0, gamma=1.0))["reference"]


def test_hours_of_a_run(checkpoint, data, one_process):
    """They are those of `costs` for the steps that will be made."""
    data([preference(n) for n in range(6)])
    rows = text_of(*dry(checkpoint, data, flop_utilization=0.5))
    assert "GPU-hours" in rows["64"] and "50% of an A100" in rows["assumed"]
    tokens = sum(shape_of(pair, True).tokens for pair in dry(checkpoint, data)[1].train)
    assert rows["tokens"].startswith(f"tokens {tokens:,} per epoch")


def test_no_weights_are_needed(checkpoint, data, one_process, tmp_path):
    """Config and tokenizer files alone are enough, as a machine without the checkpoint has them."""
    folder = shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(Path(folder).glob("*.safetensors"))
    data([preference(n) for n in range(4)])
    assert "4 to train on" in text_of(*dry(folder, data))["pairs"]
