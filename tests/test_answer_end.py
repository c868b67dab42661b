"""What DPO does with the end token: every way against stock transformers, one forward an answer."""

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn.functional import softplus

from llava.checkpoints import open_checkpoint
from llava.families.llava15 import vicuna_v1
from llava.records import read_preferences
from tests.conftest import SIDE, tiny_model
from tests.test_trainer import make_trainer, one_batch  # noqa: F401  a fixture
from train.llava_hound_dpo.losses import LossSettings, total_loss
from train.llava_hound_dpo.trainer import METRICS

BETA, SMOOTHING, GAMMA, OMEGA = 0.1, 0.1, 0.3, 0.7
ALL = range(3)


@pytest.fixture
def pairs(data):
    """Three records, one with three rejected answers of different lengths; in place of the nine of other tests."""
    rng = np.random.default_rng(0)
    records = []
    for number, (count, rejected) in enumerate([(2, ["green", "dark red", "a red and blue"]), (1, "red"), (3, "a")]):
        names = [f"{number}_{i}.png" for i in range(count)]
        for name in names:
            Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(data.images / name)
        lines = "".join(f"Image{i + 1}:<image>\n" for i in range(count)) if count > 1 else "<image>\n"
        prompt = f"{lines}In Image1, what colour is the shape?" if count > 1 else f"{lines}What colour is it?"
        answers = {"chosen": ("red", "dark blue", "white")[number], "rejected": rejected}
        records.append({"id": number, "image": names, "prompt": prompt, **answers})
    return data(records)


@pytest.fixture
def stock(checkpoint):
    """A function from our trainer to the same weights in transformers and peft alone."""

    def twin(trainer):
        processor = open_checkpoint(checkpoint).family.processor()
        settings = trainer.model.peft_config["default"]
        lora = LoraConfig(r=settings.r, lora_alpha=settings.lora_alpha, target_modules=settings.target_modules)
        model = get_peft_model(tiny_model(processor), lora)
        own = {name: p.detach() for name, p in trainer.model.named_parameters() if "lora" in name}
        assert not model.load_state_dict(own, strict=False).unexpected_keys
        return model, processor

    return twin


def token_logps(model, processor, record, folder, answer):
    """(T,) log-probs of an answer's tokens, the end token last."""
    pictures = [Image.open(folder / name) for name in record.images]
    before = "<s>" + vicuna_v1([(record.prompt, None)])
    encoded = [
        processor(text=text, images=pictures, return_tensors="pt", add_special_tokens=False)
        for text in (before, f"{before} {answer}</s>")
    ]
    length = encoded[1]["input_ids"].shape[1] - encoded[0]["input_ids"].shape[1]
    labels = encoded[1]["input_ids"][0, -length:]
    assert processor.tokenizer.convert_ids_to_tokens(labels)[-1] == "</s>" and length > 1
    logits = model(**encoded[1]).logits[0, -length - 1 : -1]
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def by_hand(model, processor, pairs, way, loss_type):
    """(total, log-prob of the chosen end, the same of the reference, margin) of every pair."""
    folder, found = pairs.parent / "images", []

    def seen(logps):
        logps = logps[:-1] if way == "left_out" else logps
        return logps.mean() if loss_type == "ipo" else logps.sum()

    for record in read_preferences(pairs):
        answers = (record.chosen, *record.rejected)
        policy = [token_logps(model, processor, record, folder, answer) for answer in answers]
        with model.disable_adapter(), torch.no_grad():
            reference = [token_logps(model, processor, record, folder, answer) for answer in answers]
        gains = [seen(a) - seen(b) for a, b in zip(policy, reference, strict=True)]
        losses = []
        for gain in gains[1:]:
            z = gains[0] - gain
            smoothed = (1 - SMOOTHING) * softplus(-BETA * z) + SMOOTHING * softplus(BETA * z)
            losses.append((z - 1 / (2 * BETA)) ** 2 if loss_type == "ipo" else smoothed)
        total = torch.stack(losses).mean() - GAMMA * policy[0].mean()
        if way == "likelihood":
            total = total - OMEGA * policy[0][-1]
        margin = BETA * (gains[0] - torch.stack(gains[1:]).mean())
        found.append(torch.stack([total, policy[0][-1], reference[0][-1], margin]))
    return torch.stack(found).T


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("way", ["kept", "left_out", "likelihood"])
def test_loss_metrics_and_gradients_are_those_of_separate_forwards(make_trainer, stock, pairs, way, loss_type):  # noqa: F811
    smoothing = ("--label_smoothing", str(SMOOTHING)) if loss_type == "sigmoid" else ()
    flags = ("--answer_end", way, "--answer_end_weight", str(OMEGA), "--gamma", str(GAMMA), "--loss_type", loss_type)
    trainer = make_trainer(*flags, *smoothing, "--attention_weight", "0", seed_b=1)
    model, processor = stock(trainer)
    totals, end, reference_end, margin = by_hand(model, processor, pairs, way, loss_type)

    trainer.model.train()
    loss, metrics = trainer.compute_loss(trainer.model, one_batch(trainer, ALL), return_outputs=True)
    assert loss.item() == pytest.approx(totals.mean().item(), rel=2e-5)
    for name, expected in (("chosen_end", end), ("reference/chosen_end", reference_end)):
        column = METRICS.index(name if "/" in name else f"logps/{name}")
        torch.testing.assert_close(metrics[:, column], expected.detach(), atol=2e-5, rtol=1e-5)
    assert (end - reference_end).abs().min() > 1e-3  # policy and reference do differ there
    if loss_type == "sigmoid":
        found = metrics[:, METRICS.index("rewards/margins")]
        torch.testing.assert_close(found, margin.detach(), atol=2e-5, rtol=1e-4)

    loss.backward()
    totals.mean().backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name], atol=1e-5 * largest, rtol=1e-3, msg=name)


@pytest.mark.parametrize("way", ["kept", "left_out"])
def test_dpo_pulls_on_the_logits_of_the_end_only_where_it_is_kept(make_trainer, way):  # noqa: F811
    trainer, seen = make_trainer("--answer_end", way, "--attention_weight", "0", seed_b=1), []

    def watch(module, inputs, logits):
        if logits.requires_grad:
            logits.retain_grad()
            seen.append(logits)

    trainer.model.train()
    trainer.model.get_output_embeddings().register_forward_hook(watch)
    batch = one_batch(trainer, ALL)
    row = batch["row"]
    trainer.compute_loss(trainer.model, batch).backward()
    pull = seen[0].grad[0].abs().amax(dim=1)
    is_end = row.labels == trainer.family.end_id
    assert is_end.sum() == len(row.answer_tokens) == 8  # every answer is whole: its last token is the end
    assert (pull[~is_end] > 0).all()
    assert (pull[is_end] == 0).all() if way == "left_out" else (pull[is_end] > 0).all()


def test_one_cache_serves_every_way(make_trainer, tmp_path):  # noqa: F811
    """Filled by a run that keeps the end; the others read it, and have the loss that they have without it."""
    cache = ("--reference_cache", str(tmp_path / "cache"))
    filling = make_trainer(*cache)
    filling.fill_reference(filling.train_dataset, [*ALL])
    for way in ("kept", "left_out", "likelihood"):
        losses = []
        for source in ((), cache):
            trainer = make_trainer("--answer_end", way, *source, seed_b=1)
            losses.append(trainer.compute_loss(trainer.model, one_batch(trainer, ALL)).item())
        assert trainer.reference.missing(trainer.train_dataset.pairs) == []
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_before_the_first_step_the_loss_is_ln_2_also_without_the_end(make_trainer):  # noqa: F811
    trainer = make_trainer("--answer_end", "left_out", "--attention_weight", "0")
    assert trainer.compute_loss(trainer.model, one_batch(trainer, ALL)).item() == torch.tensor(2.0).log().item()


def test_the_term_is_dpos_and_weighs_minus_the_log_prob():
    chosen, end = torch.tensor([-3.0, -8.0]), torch.tensor([-0.5, -2.0], requires_grad=True)
    fixed = {"chosen_tokens": torch.tensor([2.0, 4.0]), "ratio": torch.ones(2)}
    z = torch.zeros(2)

    def loss(way, dpo_alpha, gamma):
        settings = LossSettings(dpo_alpha=dpo_alpha, gamma=gamma, answer_end=way, answer_end_weight=0.2)
        return total_loss(settings, chosen, z=z if dpo_alpha else None, chosen_end=end, **fixed)[0]

    assert loss("likelihood", 2, 0).item() == pytest.approx(2 * (math.log(2) + 0.2 * 1.25))
    assert loss("left_out", 2, 0).item() == pytest.approx(2 * math.log(2))
    for way in ("left_out", "likelihood"):
        assert loss(way, 0, 1).item() == loss("kept", 0, 1).item() == 1.75
    loss("likelihood", 2, 0).backward()
    assert end.grad.tolist() == pytest.approx([-0.2, -0.2])


@pytest.mark.parametrize("flags", [("--answer_end", "kept"), ("--dpo_alpha", "0", "--gamma", "1")])
def test_a_run_that_does_nothing_with_the_end_is_the_same_experiment_as_before_the_flag(make_trainer, flags):  # noqa: F811
    assert not {name for name in make_trainer(*flags).identity if name.startswith("answer_end")}


def test_dpo_holds_the_end_unless_told_otherwise(make_trainer):  # noqa: F811
    identity = json.loads(json.dumps(make_trainer().identity))
    assert (identity["answer_end"], identity["answer_end_weight"]) == ("likelihood", 0.1)
