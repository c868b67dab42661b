"""Training on from an adapter: the same losses as without the stop, and a reference that one chooses."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.test_plan import text_of
from tests.test_trainer import make_trainer, one_batch, pairs  # noqa: F401  fixtures
from train.llava_hound_dpo.arguments import ModelArguments, parse
from train.llava_hound_dpo.run_dpo import read_inputs
from train.llava_hound_dpo.scoring import score

# One step an epoch, so that all epochs train the same pairs at once.
STEADY = ("--gradient_accumulation_steps", "3", "--lr_scheduler_type", "constant", "--learning_rate", "3e-3",
          "--save_strategy", "no")  # fmt: skip


@pytest.fixture
def adapter(make_trainer, tmp_path):  # noqa: F811
    """Folder of an adapter after one epoch."""
    trainer = make_trainer(*STEADY, "--num_train_epochs", "1", "--output_dir", str(tmp_path / "first"))
    trainer.train()
    trainer.save_model()
    return str(tmp_path / "first")


def logs_of(trainer):
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def test_one_epoch_and_one_more_are_two(make_trainer, adapter, tmp_path):  # noqa: F811
    """The first loss after the joint, before the new optimiser has done anything; the reference is the bare base."""
    whole = logs_of(make_trainer(*STEADY, "--num_train_epochs", "2", "--output_dir", str(tmp_path / "whole")))
    more = logs_of(make_trainer(*STEADY, "--num_train_epochs", "1", "--adapter", adapter))
    assert len(whole) == 2 and len(more) == 1 and abs(whole[1]["rewards/margins"]) > 1e-3
    for name in ("losses/total", "losses/dpo", "losses/attention", "attention/ratio", "rewards/margins"):
        assert more[0][name] == pytest.approx(whole[1][name], abs=1e-5), name


def test_the_adapter_as_it_was_may_be_the_reference(make_trainer, adapter, tmp_path):  # noqa: F811
    flags = (*STEADY, "--attention_weight", "0", "--adapter", adapter, "--reference", "adapter")
    trainer = make_trainer(*flags, "--num_train_epochs", "2")
    assert trainer.reference.folder == tmp_path / "out/reference"
    first, second = logs_of(trainer)
    assert first["losses/dpo"] == pytest.approx(math.log(2), abs=1e-6) and abs(first["rewards/margins"]) < 1e-4
    assert second["losses/dpo"] < math.log(2) - 1e-3


def test_a_cache_of_the_base_is_not_one_of_the_adapter(make_trainer, adapter, tmp_path):  # noqa: F811
    cached = ("--adapter", adapter, "--reference_cache", str(tmp_path / "cache"))
    logs_of(make_trainer(*STEADY, *cached, "--max_steps", "1"))
    make_trainer(*cached, "--output_dir", str(tmp_path / "again"))
    with pytest.raises(ValueError, match=r"made from something else: weights \w+ there, \w+ here"):
        make_trainer(*cached, "--reference", "adapter", "--output_dir", str(tmp_path / "other"))


def test_the_adapter_that_goes_on_is_the_one_that_was_saved(make_trainer, adapter):  # noqa: F811
    trainer = make_trainer("--adapter", adapter)
    saved = load_file(f"{adapter}/adapter_model.safetensors")
    trained = {n.replace(".default", ""): p for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained.keys() == saved.keys()
    assert all(torch.equal(trained[name], tensor) for name, tensor in saved.items())


# ---- flags


def arguments(adapter, pairs, tmp_path, *flags):  # noqa: F811
    base = json.loads((tmp_path / "first/adapter_config.json").read_text())["base_model_name_or_path"]
    required = {"model_name_or_path": base, "data_path": pairs, "image_folder": pairs.parent / "images",
                "output_dir": tmp_path / "out", "adapter": adapter, "dry_run": True}  # fmt: skip
    return parse([str(word) for name, value in required.items() for word in (f"--{name}", value)] + list(flags))


def test_the_plan_says_from_what_and_against_what_it_trains(adapter, pairs, tmp_path):  # noqa: F811
    """Rank 4 and scale 8 are the adapter's; left alone, the flags have them."""
    said = {"base": "the base, at every step", "adapter": "the adapter as it is now, from a cache"}
    for reference, words in said.items():
        settings = arguments(adapter, pairs, tmp_path, "--reference", reference)
        rows = text_of(settings, read_inputs(*settings))
        assert rows["trained"] == f"trained LoRA of rank 4, scaled by 8 / 4 = 2, on from {adapter}"
        assert rows["reference"].startswith(f"reference {words}")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ("--lora_r 16", "--lora_r 16: .* has 4; leave the flag out"),
        ("--lora_alpha 3", "--lora_alpha 3: .* has 8; leave the flag out"),
        ("--freeze_mm_mlp_adapter False", "--freeze_mm_mlp_adapter False: .* has True"),
        ("--lora_enable False", "--adapter with --lora_enable False"),
        ("--adapter nowhere", "nowhere"),
        ("--adapter {base}", "PEFT's format"),
    ],
)
def test_what_the_adapter_is_not_is_refused_before_any_weight(adapter, pairs, tmp_path, flags, reason, checkpoint):  # noqa: F811
    with pytest.raises((ValueError, FileNotFoundError), match=reason) as caught:
        read_inputs(*arguments(adapter, pairs, tmp_path, *flags.format(base=checkpoint).split()))
    assert "\n" not in str(caught.value)


def test_an_adapter_as_reference_must_be_named():
    with pytest.raises(ValueError, match="name its folder with --adapter"):
        ModelArguments("m", reference="adapter")


def test_a_tensor_that_is_missing_is_named(make_trainer, adapter):  # noqa: F811
    file = f"{adapter}/adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file)
    with pytest.raises(ValueError, match="lora_A"):
        make_trainer("--adapter", adapter)


def test_a_trained_projector_goes_on_as_well(make_trainer, tmp_path):  # noqa: F811
    flags = (*STEADY, "--max_steps", "1", "--output_dir", str(tmp_path / "p"))
    first = make_trainer(*flags, "--freeze_mm_mlp_adapter", "False")
    first.train()
    first.save_model()
    more = make_trainer("--adapter", str(tmp_path / "p"))
    batch = one_batch(first)
    for trainer in (first, more):
        trainer.model.eval()
    losses = [trainer.compute_loss(trainer.model, batch).item() for trainer in (first, more)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and not more.shares_images


@pytest.mark.parametrize("flags", [(), ("--freeze_mm_mlp_adapter", "False")], ids=["lora", "projector"])
def test_the_adapter_is_switched_off_and_on_as_peft_does(make_trainer, flags):  # noqa: F811
    """Bit for bit, the projector's saved copy too, and also where an error ends it."""
    trainer = make_trainer(*flags, seed_b=1)
    batch, model = one_batch(trainer, range(2)), trainer.model
    if flags:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "modules_to_save" in name:
                    weight.add_(0.1)
    trained = [weight.requires_grad for weight in model.parameters()]

    @torch.no_grad()
    def chosen():
        return score(model, batch["row"], trainer._encode(batch["pixels"])).chosen

    on = chosen()
    with model.disable_adapter():
        off = chosen()
    with pytest.raises(KeyError), trainer._as_reference():
        assert torch.equal(chosen(), off)
        with trainer._as_reference():  # as it was is not always on
            pass
        assert torch.equal(chosen(), off)
        raise KeyError
    assert torch.equal(chosen(), on) and not torch.equal(on, off)
    assert [weight.requires_grad for weight in model.parameters()] == trained
    assert len(trainer._switches) == 7 * model.config.text_config.num_hidden_layers + bool(flags)
