"""What is not done again for every module, layer and tensor must not have been needed."""

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.test_trainer import make_trainer, one_batch, pairs  # noqa: F401  fixtures
from train.llava_hound_dpo import trainer as trainer_module

STEADY = ("--bf16", "False", "--max_steps", "2", "--save_strategy", "no", "--seed", "7", "--learning_rate", "1e-2")


@pytest.mark.parametrize("dropout", ["0", "0.5"])
def test_checkpointing_changes_no_weight_with_and_without_dropout(make_trainer, dropout):  # noqa: F811
    """With dropout the recomputation must draw what the forward drew; that is saved only where it is needed."""

    def trained(checkpointing):
        trainer = make_trainer(*STEADY, "--lora_dropout", dropout, "--gradient_checkpointing", checkpointing)
        assert trainer.args.activation_checkpointing_kwargs["preserve_rng_state"] == (dropout != "0")
        trainer.train()
        assert any(layer.gradient_checkpointing for layer in trainer._layers) == (checkpointing == "True")
        return {name: weight.clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}

    kept, recomputed = trained("False"), trained("True")
    assert kept and all(weight.abs().max() > 0 for name, weight in kept.items() if "lora_B" in name)
    for name, weight in kept.items():
        assert torch.equal(weight, recomputed[name]), name


@pytest.mark.parametrize("rates", [{"attention_dropout": 0.1}, {"drop_path_rate": 0.1}, {}])
def test_dropout_is_found_where_configs_have_it(make_trainer, rates):  # noqa: F811
    model = make_trainer().model
    for name, rate in rates.items():
        setattr(model.config.text_config, name, rate)
    assert trainer_module.checkpointing(model)["preserve_rng_state"] == bool(rates)


def test_all_modules_train_in_every_step_whatever_was_before_it(make_trainer, monkeypatch):  # noqa: F811
    """The first step, after a wrapper that says it trains around a model that does not; and after an evaluation."""
    trainer, seen = make_trainer("--bf16", "False"), []
    trainer.current_gradient_accumulation_steps = 1
    model, batch = trainer.model, one_batch(trainer, range(2))
    loss_of = trainer.compute_loss

    def watched(*args, **kwargs):
        seen.append(all(module.training for module in model.modules()))
        return loss_of(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", watched)
    model.get_base_model().eval()
    assert model.training and not model.get_base_model().training
    trainer.training_step(model, batch)
    trainer.training_step(model, batch)
    trainer.evaluate(trainer.train_dataset)
    assert seen[:2] == [True, True] and not any(seen[2:])
    del seen[:]
    trainer.training_step(model, batch)
    assert seen == [True] and "train" not in vars(model)


def test_layers_are_checkpointed_again_after_an_error(make_trainer):  # noqa: F811
    trainer = make_trainer("--gradient_checkpointing", "True")
    trainer.model.activation_checkpointing_enable(trainer.args.activation_checkpointing_kwargs)
    before = [layer.gradient_checkpointing for layer in trainer._layers]
    with pytest.raises(KeyError), trainer_module.without_gradient(trainer._layers):
        assert not torch.is_grad_enabled() and not any(layer.gradient_checkpointing for layer in trainer._layers)
        raise KeyError
    assert torch.is_grad_enabled() and [layer.gradient_checkpointing for layer in trainer._layers] == before
    assert any(before) and all(isinstance(layer, GradientCheckpointingLayer) for layer in trainer._layers)
