"""The trainer in one process: its loss against TRL, its gradients, its metrics, its checkpoints."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava.checkpoints import open_checkpoint
from llava.families.llava15 import Llava15, vicuna_v1
from llava.records import read_preferences
from llava.runtime import write_text
from tests.conftest import BASE, SIDE, tiny_model
from train.llava_hound_dpo import checkpoints
from train.llava_hound_dpo.arguments import ModelArguments, parse
from train.llava_hound_dpo.checkpoints import COMPLETE, latest_checkpoint
from train.llava_hound_dpo.losses import LossSettings
from train.llava_hound_dpo.model import make_trainable, parameter_table
from train.llava_hound_dpo.run_dpo import build_trainer, describe_run, read_inputs
from train.llava_hound_dpo.trainer import METRICS, AttentionAwareDPOTrainer


@pytest.fixture
def pairs(data):
    """Nine records, three a format, with noise for pictures; returns the path of train.json."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(9):
        image_type = ("sequence", "collage", "pip")[number % 3]
        count = 2 + number % 2 if image_type == "sequence" else 1
        names = [f"{number}_{i}.png" for i in range(count)]
        for name in names:
            Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(data.images / name)
        lines = "".join(f"Image{i + 1}:<image>\n" for i in range(count)) if image_type == "sequence" else "<image>\n"
        where = "In the central picture" if image_type == "pip" else "In Image2"
        record = {"id": number, "image": names, "prompt": f"{lines}{where}, what colour is the shape?"}
        record |= {"chosen": "red" if number % 2 else "dark blue", "rejected": "green", "image_type": image_type}
        records.append(record | ({"grid": [2, 2]} if image_type == "collage" else {}))
    return data(records)


# Also on the model that the study trains: what it shows must not hang on a term that works on other weights only.
on_the_study_too = pytest.mark.parametrize("start", [None, BASE], ids=["untrained", "study"], indirect=True)


@pytest.fixture
def make_trainer(pairs, start, tmp_path):
    """A function from flags to a trainer with its model on the CPU."""

    def make(*flags, seed_b=None) -> AttentionAwareDPOTrainer:
        argv = [
            "--model_name_or_path",
            start,
            "--data_path",
            str(pairs),
            "--image_folder",
            str(pairs.parent / "images"),
        ]
        argv += ["--output_dir", str(tmp_path / "out"), "--lora_r", "4", "--lora_alpha", "8", "--disable_tqdm", "True"]
        argv += ["--per_device_train_batch_size", "3", "--per_device_eval_batch_size", "2", *flags]
        model_args, data_args, loss_args, args = parse(argv)
        inputs = read_inputs(model_args, data_args, loss_args, args)
        torch.manual_seed(0)  # two trainers of a test start from the same adapter
        opened = open_checkpoint(start)
        policy = make_trainable(opened.load(), type(opened.family), model_args)
        if args.activation_checkpointing:  # Trainer.train() does it; tests that call compute_loss would go without
            policy.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
        if seed_b is not None:
            fill_lora_b(policy, seed_b)
        identity = describe_run(model_args, data_args, loss_args, args, inputs)
        return build_trainer(policy, model_args, loss_args, args, inputs, identity)

    return make


def fill_lora_b(model, seed):
    """Move the adapter off its zero start, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def one_batch(trainer, indices=range(9)):
    return trainer.data_collator([trainer.train_dataset[i] for i in indices])


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_dpo_loss_equals_trl(make_trainer, checkpoint, pairs, tmp_path, loss_type):
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    ours = make_trainer("--loss_type", loss_type, "--attention_weight", "0", "--answer_end", "kept", seed_b=1)
    ours.model.train()
    loss, metrics = ours.compute_loss(ours.model, one_batch(ours), return_outputs=True)

    records = read_preferences(pairs)
    examples = [
        {
            "images": [Image.open(pairs.parent / "images" / name) for name in record.images],
            "prompt": "<s>" + vicuna_v1([(record.prompt, None)]),
            "chosen": record.chosen + "</s>",
            "rejected": record.rejected[0] + "</s>",
        }
        for record in records
    ]
    processor = open_checkpoint(checkpoint).family.processor()
    settings = ours.model.peft_config["default"]
    theirs = DPOTrainer(
        model=tiny_model(processor),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"), loss_type=[loss_type], max_length=None, use_cpu=True, report_to=[]
        ),
        train_dataset=examples_as_dataset(examples),
        processing_class=processor,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=settings.target_modules),
    )
    own_weights = {name: p for name, p in ours.model.named_parameters() if "lora" in name}
    missing = theirs.model.load_state_dict(own_weights, strict=False)
    assert not missing.unexpected_keys
    theirs.model.train()
    batch = DataCollatorForVisionPreference(processor)(examples)
    expected = theirs.compute_loss(theirs.model, batch)
    assert abs(metrics[:, METRICS.index("rewards/margins")]).min() > 1e-3  # policy and reference do differ
    assert loss.item() == pytest.approx(expected.item(), abs=2e-5)
    means = dict(zip(METRICS, metrics.nanmean(dim=0).tolist(), strict=True))
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert means[name] == pytest.approx(theirs._metrics["train"][name][0], abs=1e-4), name


def examples_as_dataset(examples):
    from datasets import Dataset

    return Dataset.from_list(
        [{k: v for k, v in e.items() if k != "images"} | {"images": e["images"]} for e in examples]
    )


@on_the_study_too
@pytest.mark.parametrize("checkpointing", ["False", "True"])
def test_with_a_fresh_adapter_the_dpo_loss_is_exactly_ln_2(make_trainer, checkpointing):
    flags = ("--attention_weight", "0", "--answer_end", "kept", "--gradient_checkpointing", checkpointing)
    trainer = make_trainer(*flags)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, one_batch(trainer))
    assert loss.item() == torch.tensor(2.0).log().item()


@on_the_study_too
@pytest.mark.parametrize("checkpointing", ["False", "True"])
@pytest.mark.parametrize("recipe", [("1", "0"), ("0", "1")])
@pytest.mark.parametrize(("layers", "probed"), [("middle", 2), ("auto", 3)])
def test_the_attention_term_reaches_the_adapter(make_trainer, checkpointing, recipe, layers, probed):
    """What the term adds to the gradient is not zero, on query and key of every layer up to the last probe."""

    def gradients(weight):
        flags = ("--dpo_alpha", recipe[0], "--gamma", recipe[1], "--attention_threshold", "1")
        flags += ("--attention_layers", layers)
        trainer = make_trainer(
            *flags, "--attention_weight", weight, "--gradient_checkpointing", checkpointing, seed_b=3
        )
        trainer.model.train()
        trainer.compute_loss(trainer.model, one_batch(trainer)).backward()
        return {n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}

    without, with_term = gradients("0"), gradients("5")
    for name, gradient in with_term.items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        difference = (gradient - without[name]).abs().max().item()
        is_read = layer < probed or (layer == probed and ("q_proj" in name or "k_proj" in name))
        assert (difference > 1e-7) == is_read, (name, difference)


@on_the_study_too
def test_training_on_attention_alone_raises_the_target_mass(make_trainer):
    flags = ("--attention_weight", "50", "--attention_threshold", "1", "--learning_rate", "3e-3", "--max_steps", "20")
    trainer = make_trainer(*flags, "--lr_scheduler_type", "constant", "--save_strategy", "no")
    trainer.train()
    ratios = [log["attention/ratio"] for log in trainer.state.log_history if "attention/ratio" in log]
    losses = [log["losses/attention"] for log in trainer.state.log_history if "losses/attention" in log]
    assert ratios[-1] > ratios[0] + 0.1
    assert losses[-1] < losses[0] - 0.1


def test_sft_recipe_computes_neither_rejected_nor_reference(make_trainer, monkeypatch):
    trainer = make_trainer("--dpo_alpha", "0", "--gamma", "1")
    monkeypatch.setattr(trainer, "_reference", None)  # calling it would raise
    batch = one_batch(trainer)
    assert len(batch["row"].rejected) == 0 and len(batch["row"].chosen) == len(batch["row"].answer_tokens)
    trainer.model.train()
    loss, metrics = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss.isfinite()
    assert metrics[:, METRICS.index("losses/dpo")].isnan().all()


def test_accumulated_and_whole_batches_have_the_same_gradient(make_trainer):
    trainer = make_trainer("--gamma", "0.5", seed_b=2)
    trainer.model.train()

    def gradients(parts):
        trainer.model.zero_grad()
        for part in parts:
            (trainer.compute_loss(trainer.model, one_batch(trainer, part)) / len(parts)).backward()
        return [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]

    for whole, split in zip(gradients([range(9)]), gradients([range(3), range(3, 6), range(6, 9)]), strict=True):
        torch.testing.assert_close(whole, split, atol=1e-5, rtol=1e-4)


def test_evaluation_counts_every_pair_once(make_trainer):
    """Five held-out pairs in batches of two: the metrics are plain means over the five."""
    trainer = make_trainer("--eval_split", "0.55", "--gamma", "0.5", seed_b=2)
    assert len(trainer.eval_dataset) == 5
    found = trainer.evaluate()
    trainer.model.eval()
    rows = []
    for index in range(5):
        batch = trainer.data_collator([trainer.eval_dataset[index]])
        with torch.no_grad():
            rows.append(trainer.compute_loss(trainer.model, batch, return_outputs=True)[1])
    expected = torch.cat(rows).nanmean(dim=0)
    assert found["eval_loss"] == pytest.approx(expected[METRICS.index("losses/total")].item(), abs=1e-5)
    for name, value in zip(METRICS, expected.tolist(), strict=True):
        if not math.isnan(value):
            assert found[f"eval_{name}"] == pytest.approx(value, abs=1e-4), name


def test_logged_ratio_is_the_mean_over_all_micro_batches_per_format(make_trainer):
    trainer = make_trainer("--max_steps", "1", "--gradient_accumulation_steps", "3", "--save_strategy", "no")
    whole, metrics = trainer.compute_loss(trainer.model, one_batch(trainer), return_outputs=True)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["loss"] == pytest.approx(whole.item(), abs=1e-4)
    for name, value in zip(METRICS, metrics.nanmean(dim=0).tolist(), strict=True):
        assert (name in log) == (not math.isnan(value)), name
        if name in log:
            assert log[name] == pytest.approx(value, abs=1e-4), name
    assert {"attention/ratio_sequence", "attention/ratio_collage", "attention/ratio_pip"} <= set(log)


def test_a_loss_that_is_not_finite_stops_before_the_update(make_trainer):
    trainer = make_trainer()
    trainer.model.train()
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if "lora_A" in n).fill_(math.nan)
        next(p for n, p in trainer.model.named_parameters() if "lora_B" in n).fill_(1.0)
    with pytest.raises(FloatingPointError, match="record"):
        trainer.compute_loss(trainer.model, one_batch(trainer))


def test_a_trained_projector_is_in_the_adapter_and_not_in_the_reference(make_trainer, tmp_path):
    from safetensors.torch import load_file

    trainer = make_trainer("--freeze_mm_mlp_adapter", "False", "--mm_projector_lr", "1e-2", "--max_steps", "2")
    assert not trainer.shares_images
    before = trainer._reference(
        trainer.model, one_batch(trainer), trainer._encode(one_batch(trainer)["pixels"]), None
    )
    trainer.train()
    batch = one_batch(trainer)
    after = trainer._reference(trainer.model, batch, trainer._encode(batch["pixels"]), None)
    assert torch.equal(before.chosen, after.chosen)
    saved = load_file(tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors")
    assert any("multi_modal_projector" in name for name in saved)
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups if group["params"]}
    assert 1e-2 in rates and len(rates) == 2


@pytest.mark.parametrize(
    "flags",
    [
        "--eval_on_start True --eval_accumulation_steps 1 --lr_scheduler_type reduce_lr_on_plateau --save_steps 1 "
        "--load_best_model_at_end True --metric_for_best_model attention/ratio --save_total_limit 1 --eval_split 0.3 "
        "--eval_strategy steps --eval_steps 1 --dataloader_num_workers 1 --dataloader_persistent_workers True",
        "--optim adafactor --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {\"min_lr_rate\":0.1} "
        "--skip_memory_metrics False --torch_empty_cache_steps 1 --logging_strategy epoch --warmup_ratio 0.5",
    ],
)
def test_flags_of_transformers_that_are_said_to_work_do(make_trainer, flags):
    """A step's loss is that of the pairs, whatever else is asked for."""
    trainer = make_trainer("--attention_weight", "0", "--answer_end", "kept", "--max_steps", "1", *flags.split())
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)


class TestLatestCheckpoint:
    def make(self, folder: Path, step: int, identity: dict | None):
        path = folder / f"checkpoint-{step}"
        path.mkdir()
        if identity is not None:
            (path / COMPLETE).write_text(json.dumps(identity))
        return path

    def test_none(self, tmp_path):
        assert latest_checkpoint(tmp_path / "nowhere", {}) is None

    def test_newest_by_number(self, tmp_path):
        self.make(tmp_path, 9, {"a": 1})
        newest = self.make(tmp_path, 10, {"a": 1})
        assert latest_checkpoint(tmp_path, {"a": 1}) == newest

    def test_an_interrupted_one_is_passed_over(self, tmp_path):
        complete = self.make(tmp_path, 5, {"a": 1})
        self.make(tmp_path, 10, None)
        assert latest_checkpoint(tmp_path, {"a": 1}) == complete

    def test_of_another_experiment_is_refused_with_the_difference(self, tmp_path):
        self.make(tmp_path, 5, {"dpo_alpha": 1.0, "beta": 0.1})
        with pytest.raises(ValueError, match=r"dpo_alpha 1.0 there, 0.0 here"):
            latest_checkpoint(tmp_path, {"dpo_alpha": 0.0, "beta": 0.1})


class Killed(BaseException):
    """Stands for a kill, which nothing handles."""


def test_a_kill_while_saving_leaves_the_checkpoint_before_it(make_trainer, tmp_path, monkeypatch):
    written = []

    def write(path, text):
        if len(written) == 1:
            raise Killed
        written.append(path)
        write_text(path, text)

    monkeypatch.setattr(checkpoints, "write_text", write)
    flags = ["--save_steps", "1", "--max_steps", "2", "--save_total_limit", "1"]
    with pytest.raises(Killed):
        make_trainer(*flags).train()
    identity = json.loads(written[0].read_text())
    assert (tmp_path / "out/checkpoint-2").is_dir()
    assert latest_checkpoint(tmp_path / "out", identity) == tmp_path / "out/checkpoint-1"

    monkeypatch.setattr(checkpoints, "write_text", write_text)
    (tmp_path / "out/checkpoint-99").mkdir()  # of a stop that was killed: newer by number, and good for nothing
    make_trainer(*flags).train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_policy_table_names_what_is_trained(processor):
    model = make_trainable(tiny_model(processor), Llava15, ModelArguments("x", lora_r=4, freeze_mm_mlp_adapter=False))
    lines = {line.split()[0]: line.split() for line in parameter_table(model, Llava15).splitlines()[1:]}
    assert lines["vision_tower"][2] == "0"
    assert lines["multi_modal_projector"][2] != "0"
    # r * (in + out) per linear layer: 4 attention (128, 128), gate and up (128, 384), down (384, 128); 4 layers
    assert lines["language_model"][2] == f"{4 * 4 * (4 * 256 + 3 * 512):,}"
    assert lines["lm_head"][2] == "0"


def test_what_recipes_need():
    needs = {}
    for gate in ("none", "preferred"):
        for alpha in (1, 0):
            own = LossSettings(dpo_alpha=alpha, gamma=1 - alpha, attention_gate=gate)
            needs[gate, alpha] = (own.needs_rejected, own.needs_reference)
    assert needs == {
        ("none", 1): (True, True), ("none", 0): (False, False),
        ("preferred", 1): (True, True), ("preferred", 0): (True, False),
    }  # fmt: skip
