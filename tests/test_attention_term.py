"""Variants of the attention term: chosen heads, weighted by what they carry; a schedule of λ; τ by number of images."""

import dataclasses
import json

import pytest
import torch

from llava.attention import attention_ratio, carried, mean_over_layers
from llava.checkpoints import weight_digest
from llava.heads import Heads, RankedHead, Ranking
from llava.layout import num_parts, pack
from llava.records import parse_preference
from tests.conftest import preference, tiny_model
from tests.test_packing import eager_twin, pairs_of
from tests.test_trainer import fill_lora_b, make_trainer, one_batch, pairs  # noqa: F401  two fixtures
from train.llava_hound_dpo import trainer as trainer_module
from train.llava_hound_dpo.arguments import LossArguments, ModelArguments
from train.llava_hound_dpo.losses import Weights, hinge_attention, threshold_of, total_loss, weight_factor
from train.llava_hound_dpo.model import make_trainable
from train.llava_hound_dpo.scoring import head_weights, score
from train.llava_hound_dpo.trainer import METRICS

SOME = Heads({1: (0, 3), 2: (1,)})
NUM_HEADS, HEAD_SIZE = 4, 32


@pytest.fixture
def heads_file(checkpoint, tmp_path):
    """A file whose three best heads are SOME."""
    digest = weight_digest(checkpoint)
    ranked = tuple(RankedHead(*place, 0.9, 0.5) for place in ((2, 1), (1, 0), (1, 3), (0, 0), (3, 2)))
    Ranking(checkpoint, checkpoint, digest, digest, "3 (c)", 3, 0.4, ranked).write(tmp_path / "heads.json")
    return tmp_path / "heads.json"


# ---- chosen heads, and what they carry


def eager_masses(eager, pair, pixels, layer, weigh):
    """(target, images) mean mass of one pair over rows and heads by hand; `weigh` gives (H, rows) weights."""
    values = {}
    attention = eager.model.language_model.layers[layer].self_attn
    hook = attention.v_proj.register_forward_hook(lambda _, args, out: values.update(own=out))
    ids = torch.tensor([[*pair.prompt, *pair.chosen]])
    out = eager(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, output_attentions=True)
    hook.remove()
    rows = slice(len(pair.prompt) - 1, ids.shape[1] - 1)
    maps, value = out.attentions[layer][0, :, rows], values["own"][0].view(-1, NUM_HEADS, HEAD_SIZE).transpose(0, 1)
    weights = weigh(maps @ value, attention.o_proj.weight)
    is_image = ids[0] == eager.config.image_token_id
    target = torch.zeros(ids.shape[1]).masked_scatter(is_image, pair.target)
    by_row = torch.stack([maps @ target, maps @ is_image.float()], dim=-1)
    return ((by_row * weights[..., None]).sum(0) / weights.sum(0)[:, None]).mean(0)


@pytest.mark.parametrize("carries", [False, True], ids=["alike", "by what they carry"])
def test_masses_of_chosen_heads_equal_eager_attention_by_hand(processor, model, carries):
    eager, (asked, pixels, own_pixels) = eager_twin(model, processor), pairs_of(model)
    row = pack(asked, model.config.image_token_id)
    settings = {"layers": SOME.layers, "heads": SOME.chosen(NUM_HEADS), "carries": carries}
    found = score(model, row, pixel_values=pixels, **settings).masses

    def weigh(heads):
        def weigh(outputs, projection):
            columns = projection.view(-1, NUM_HEADS, HEAD_SIZE).permute(1, 2, 0)
            norms = (outputs @ columns).norm(dim=-1) if carries else torch.ones(outputs.shape[:2])
            return torch.stack([norms[h] * (h in heads) for h in range(NUM_HEADS)])

        return weigh

    for number, (pair, own) in enumerate(zip(asked, own_pixels, strict=True)):
        with torch.no_grad():
            expected = [eager_masses(eager, pair, own, layer, weigh(heads)) for layer, heads in SOME.by_layer.items()]
        torch.testing.assert_close(found[:, number], torch.stack(expected), atol=2e-6, rtol=1e-4)


def test_what_heads_carry_changes_no_other_score(model):
    asked, pixels, _ = pairs_of(model)
    row = pack(asked, model.config.image_token_id)
    plain, weighed = (score(model, row, pixel_values=pixels, layers=SOME.layers, carries=c) for c in (False, True))
    assert torch.equal(plain.chosen, weighed.chosen) and torch.equal(plain.rejected, weighed.rejected)
    assert (plain.masses - weighed.masses).abs().max() > 1e-3


def test_an_adapter_of_the_output_projection_counts_in_what_is_carried(processor):
    policy = make_trainable(tiny_model(processor), ModelArguments("x", lora_r=4))
    fill_lora_b(policy, 1)
    projection = policy.get_base_model().model.language_model.layers[1].self_attn.o_proj
    whole = projection.base_layer.weight + projection.get_delta_weight("default")
    out = torch.randn(2, 5, NUM_HEADS, HEAD_SIZE)
    expected = torch.einsum("bthd,ohd->bhto", out, whole.view(-1, NUM_HEADS, HEAD_SIZE)).norm(dim=-1)
    found = carried(projection, out)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not found.requires_grad


def test_head_weights():
    chosen, carry = SOME.chosen(NUM_HEADS), torch.rand(2, NUM_HEADS, 5)
    assert head_weights(None, None) is None and head_weights(None, carry) is carry
    assert torch.equal(head_weights(chosen, None), chosen[..., None])
    assert torch.equal(head_weights(chosen, carry), chosen[..., None] * carry)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("carries", [False, True])
def test_the_gradient_of_the_term_reaches_queries_and_keys_of_the_chosen_heads_alone(model, carries, checkpointing):
    """In the last probed layer; below it everything that its queries and keys are made of."""
    asked, pixels, _ = pairs_of(model)
    if checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    chosen, row = Heads({2: (1, 3)}), pack(asked, model.config.image_token_id)
    settings = {"layers": chosen.layers, "heads": chosen.chosen(NUM_HEADS), "carries": carries}
    masses = score(model, row, pixel_values=pixels, **settings).masses
    ratio = mean_over_layers(attention_ratio(masses), settings["heads"])
    hinge_attention(ratio, 1.0).mean().backward()
    layers = model.model.language_model.layers
    for projection in (layers[2].self_attn.q_proj, layers[2].self_attn.k_proj):
        norms = projection.weight.grad.view(NUM_HEADS, HEAD_SIZE, -1).abs().amax(dim=(1, 2))
        assert (norms > 0).tolist() == [False, True, False, True]
    untouched = (layers[2].self_attn.v_proj, layers[2].self_attn.o_proj, layers[3].self_attn.q_proj)
    assert all(p.weight.grad is None or not p.weight.grad.any() for p in untouched)
    assert layers[1].self_attn.v_proj.weight.grad.any()


def test_flags_reach_the_trainer_its_log_and_the_record_of_the_run(make_trainer, heads_file):  # noqa: F811
    flags = ("--attention_heads", str(heads_file), "--top_heads", "3")
    trainer = make_trainer(*flags)
    assert trainer.layers == {1, 2} and torch.equal(trainer.heads, SOME.chosen(NUM_HEADS)) and not trainer.carries
    trainer.model.eval()
    batch = one_batch(trainer)
    with torch.no_grad():
        _, metrics = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        settings = {"layers": SOME.layers, "heads": trainer.heads}
        by_layer = attention_ratio(score(trainer.model, batch["row"], batch["pixel_values"], **settings).masses)
    torch.testing.assert_close(metrics[:, METRICS.index("attention/ratio")], (2 * by_layer[0] + by_layer[1]) / 3)
    identity = next(c.identity for c in trainer.callback_handler.callbacks if hasattr(c, "identity"))
    assert identity["attention_heads"] == SOME.to_json() and identity["top_heads"] == 3
    assert make_trainer(*flags, "--attention_carry").carries
    assert make_trainer(*flags[:3], "1", "--attention_layers", "0-1").layers == {1}  # the best of these layers


def test_a_weight_of_zero_is_the_plain_arm_bit_for_bit(make_trainer, heads_file, monkeypatch):  # noqa: F811
    """Three steps with every variant on, against three steps whose loss does not know of the term."""
    common = ("--attention_weight", "0", "--max_steps", "3", "--learning_rate", "1e-3", "--save_strategy", "no")
    variants = ["--attention_heads", str(heads_file), "--top_heads", "3", "--attention_carry", "--attention_threshold"]
    variants += ["2:1,default:0.9", "--attention_schedule", "linear_decay", "--attention_warmup_share", "0.5"]

    def weights(*flags):
        trainer = make_trainer(*common, "--gamma", "0.3", *flags, seed_b=3)
        before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        trainer.train()
        after = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return after

    found = weights(*variants)
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "total_loss", without_term)
        expected = weights()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with_term = weights(*variants, "--attention_weight", "0.1")
    assert any(not torch.equal(a, b) for a, b in zip(with_term, expected, strict=True))


def without_term(weights, chosen, tokens, ratio, z, num_images):
    _, parts = total_loss(weights, chosen, tokens, ratio.detach(), z)
    plain = weights.gamma * parts["sft"] + weights.dpo_alpha * parts["dpo"]
    return plain.mean(), parts | {"total": plain}


# ---- schedule


@pytest.mark.parametrize(
    ("progress", "warmup", "schedule", "expected"),
    [
        (0.0, 0.0, "constant", 1.0),
        (0.7, 0.0, "constant", 1.0),
        (0.0, 0.2, "constant", 0.0),
        (0.05, 0.2, "constant", 0.25),
        (0.2, 0.2, "constant", 1.0),
        (0.9, 0.2, "constant", 1.0),
        (0.0, 0.0, "linear_decay", 1.0),
        (0.25, 0.0, "linear_decay", 0.75),
        (0.1, 0.2, "linear_decay", 0.5),
        (0.6, 0.2, "linear_decay", 0.5),
        (1.0, 0.2, "linear_decay", 0.0),
    ],
)
def test_factor_of_the_weight_by_hand(progress, warmup, schedule, expected):
    assert weight_factor(progress, warmup, schedule) == pytest.approx(expected)


def test_without_a_schedule_the_weights_are_the_same():
    weights = Weights(1.0, 0.5)
    assert not weights.is_scheduled and weights.at(0.0) == weights.at(0.9) == weights


def test_the_weight_of_every_step_is_logged(make_trainer):  # noqa: F811
    flags = ("--attention_weight", "2", "--attention_warmup_share", "0.5", "--attention_schedule", "linear_decay")
    trainer = make_trainer(*flags, "--max_steps", "4", "--save_strategy", "no", "--eval_split", "0.3")
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["attention/weight"] for log in logs] == pytest.approx([0.0, 1.0, 2.0, 1.0])
    for log in logs:
        expected = log["losses/dpo"] + log["attention/weight"] * log["losses/attention"]
        assert log["losses/total"] == pytest.approx(expected, abs=1e-5)
    assert trainer.evaluate()["eval_attention/weight"] == 2.0  # so that evaluations compare with each other


def test_a_constant_weight_is_not_logged(make_trainer):  # noqa: F811
    trainer = make_trainer("--max_steps", "1", "--save_strategy", "no")
    trainer.train()
    assert not any("attention/weight" in log for log in trainer.state.log_history)


# ---- thresholds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.8", 0.8),
        (0.8, 0.8),
        ("default:0.8", 0.8),
        ("2:0.85,3:0.8, default:0.75", {"2": 0.85, "3": 0.8, "default": 0.75}),
        ("0.75,5:0.7", {"default": 0.75, "5": 0.7}),
    ],
)
def test_thresholds_are_read(text, expected):
    found = LossArguments(attention_threshold=text)
    assert found.attention_threshold == found.weights().attention_threshold == expected
    assert dataclasses.replace(found).attention_threshold == expected
    assert json.loads(json.dumps(found.attention_threshold)) == expected  # as checkpoints keep it


@pytest.mark.parametrize(
    "text",
    ["", "much", "nan", "2:0.8", "2:0.8,default", "0:0.8,default:0.7", "x:0.8,0.7", "0.7,0.8", "2:3:4,1", "2:inf,1"],
)
def test_thresholds_that_are_none(text):
    with pytest.raises(ValueError, match=r"--attention_threshold .*default:0\.75") as error:
        LossArguments(attention_threshold=text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [{"attention_warmup_share": 1.0}, {"attention_warmup_share": -0.1}], ids=str)
def test_warm_ups_that_are_none(flags):
    with pytest.raises(ValueError, match="--attention_warmup_share"):
        LossArguments(**flags)


def test_threshold_of_every_pair():
    table, numbers = {"2": 0.9, "4": 0.6, "default": 0.75}, torch.tensor([2, 3, 4, 2])
    assert threshold_of(0.5, None) == 0.5
    torch.testing.assert_close(threshold_of(table, numbers), torch.tensor([0.9, 0.75, 0.6, 0.9]))
    ratio = torch.tensor([0.5, 0.5, 0.5, 0.95])
    weights = Weights(0.0, 1.0, attention_threshold=table)
    _, parts = total_loss(weights, -torch.ones(4), torch.ones(4), ratio, None, numbers)
    torch.testing.assert_close(parts["attention"], torch.tensor([0.4, 0.25, 0.1, 0.0]))


def test_pictures_of_a_prompt():
    def parts(sizes=(), **changes):
        return num_parts(parse_preference(preference(**changes), "here"), sizes)

    assert parts(num_images=3) == 3
    one = {"num_images": 1, "target": 1}
    assert parts(**one, image_type="collage", grid=[2, 3]) == 6
    assert parts([(936, 488)], **one, image_type="collage") == 2  # the published canvas
    assert parts([(72, 72)], **one, image_type="collage") == 1
    assert parts(**one, image_type="pip") == 2 and parts(**one, image_type="single") == 1


def test_batches_know_their_pictures(make_trainer):  # noqa: F811
    trainer = make_trainer("--attention_threshold", "2:1,3:0.5,4:0.25,default:0")
    assert one_batch(trainer)["num_images"].tolist() == [2, 4, 2, 3, 4, 2, 2, 4, 2]
    _, metrics = trainer.compute_loss(trainer.model, one_batch(trainer), return_outputs=True)
    ratio, found = (metrics[:, METRICS.index(name)] for name in ("attention/ratio", "losses/attention"))
    thresholds = torch.tensor([1, 0.25, 1, 0.5, 0.25, 1, 1, 0.25, 1])
    torch.testing.assert_close(found, (thresholds - ratio).clamp(min=0))
