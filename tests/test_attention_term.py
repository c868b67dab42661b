"""The attention term of selected heads, and without any weight."""

import json

import pytest
import torch

from llava.attention import attention_ratio, mean_over_layers
from llava.checkpoints import open_checkpoint
from llava.heads import Heads, RankedHead, Ranking
from tests.conftest import encoded
from tests.test_packing import EACH_ROWS, ROWS, eager_twin, pairs_of
from tests.test_trainer import make_trainer, one_batch, pairs  # noqa: F401  two fixtures
from train.llava_hound_dpo import trainer as trainer_module
from train.llava_hound_dpo.checkpoints import COMPLETE, latest_checkpoint
from train.llava_hound_dpo.losses import hinge_attention, total_loss
from train.llava_hound_dpo.packing import pack
from train.llava_hound_dpo.scoring import score
from train.llava_hound_dpo.trainer import METRICS

SOME = Heads({1: (0, 3), 2: (1,)})
NUM_HEADS, HEAD_SIZE = 4, 32


@pytest.fixture
def heads_file(checkpoint, tmp_path):
    """A file whose three best heads are SOME."""
    digest = open_checkpoint(checkpoint).digest
    ranked = tuple(RankedHead(*place, 0.9, 0.5) for place in ((2, 1), (1, 0), (1, 3), (0, 0), (3, 2)))
    Ranking(checkpoint, checkpoint, digest, digest, "3 (c)", 3, 0.4, ranked).write(tmp_path / "heads.json")
    return tmp_path / "heads.json"


def eager_masses(eager, pair, pixels, layer, heads, rows):
    """(target, images) mean mass of one pair over these rows and heads, by hand."""
    ids = torch.tensor([[*pair.prompt, *pair.chosen]])
    out = eager(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, output_attentions=True)
    maps = out.attentions[layer][0, list(heads), len(pair.prompt) - 1 : -1][:, ROWS[rows]]
    is_image = ids[0] == eager.config.image_token_id
    target = torch.zeros(ids.shape[1]).masked_scatter(is_image, pair.target)
    by_row = torch.stack([maps @ target, maps @ is_image.float()], dim=-1)
    return by_row.mean(dim=(0, 1))


@EACH_ROWS
def test_masses_of_selected_heads_equal_eager_attention_by_hand(processor, model, rows):
    eager, (asked, pixels, own_pixels) = eager_twin(model, processor), pairs_of(model)
    row = pack(asked, model.config.image_token_id)
    settings = {"layers": SOME.layers, "heads": SOME.selected(NUM_HEADS), "rows": rows}
    found = score(model, row, encoded(model, pixels), **settings).masses
    for number, (pair, own) in enumerate(zip(asked, own_pixels, strict=True)):
        with torch.no_grad():
            expected = [eager_masses(eager, pair, own, layer, heads, rows) for layer, heads in SOME.by_layer.items()]
        torch.testing.assert_close(found[:, number], torch.stack(expected), atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_the_term_reaches_queries_and_keys_of_the_selected_heads_alone(model, checkpointing):
    """In the last probed layer; below it everything that its queries and keys are made of."""
    asked, pixels, _ = pairs_of(model)
    if checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    chosen, row = Heads({2: (1, 3)}), pack(asked, model.config.image_token_id)
    settings = {"layers": chosen.layers, "heads": chosen.selected(NUM_HEADS)}
    masses = score(model, row, encoded(model, pixels), **settings).masses
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
    assert trainer.layers == {1, 2} and torch.equal(trainer.heads, SOME.selected(NUM_HEADS))
    trainer.model.eval()
    batch = one_batch(trainer)
    with torch.no_grad():
        _, metrics = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        features = trainer._encode(batch["pixels"])
        settings = {"layers": SOME.layers, "heads": trainer.heads, "rows": "first"}
        by_layer = attention_ratio(score(trainer.model, batch["row"], features, **settings).masses)
    torch.testing.assert_close(metrics[:, METRICS.index("attention/ratio")], (2 * by_layer[0] + by_layer[1]) / 3)
    identity = trainer.identity
    assert identity["attention_heads"] == SOME.to_json() and identity["top_heads"] == 3
    assert make_trainer(*flags[:3], "1", "--attention_layers", "0-1").layers == {1}  # the best of these layers


def test_a_run_whose_auto_was_the_middle_goes_on_with_the_middle_only(make_trainer, heads_file, tmp_path):  # noqa: F811
    """What a checkpoint of before says, and that today's flags are refused instead of training on other layers."""
    (tmp_path / "checkpoint-5").mkdir()
    saved = tmp_path / "checkpoint-5" / COMPLETE

    def goes_on(*flags):
        trainer = make_trainer("--attention_rows", "all", *flags)
        return latest_checkpoint(tmp_path, json.loads(json.dumps(trainer.identity))), trainer.layers

    own = json.loads(json.dumps(make_trainer("--attention_rows", "all").identity))
    before = own | {"attention_layers": "auto"}
    assert "attention_rows" not in own
    saved.write_text(json.dumps(before))
    assert goes_on("--attention_layers", "middle") == (saved.parent, {2})
    for flags in ((), ("--attention_layers", "all")):
        with pytest.raises(ValueError, match="attention_layers auto there, all here"):
            goes_on(*flags)
    saved.write_text(json.dumps(before | {"attention_layers": "all"}))  # what was all is what auto is now
    assert goes_on() == goes_on("--attention_layers", "all") == (saved.parent, {0, 1, 2, 3})
    heads = ("--attention_heads", str(heads_file), "--top_heads", "3")
    saved.write_text(json.dumps(before | {"attention_heads": SOME.to_json(), "top_heads": 3}))
    assert goes_on(*heads) == (saved.parent, {1, 2})


def test_a_weight_of_zero_is_the_plain_arm_bit_for_bit(make_trainer, heads_file, monkeypatch):  # noqa: F811
    """Three steps with every variant on, against three steps whose loss does not know of the term."""
    common = ("--attention_weight", "0", "--max_steps", "3", "--learning_rate", "1e-3", "--save_strategy", "no")
    common += ("--answer_end", "kept")
    variants = ["--attention_heads", str(heads_file), "--top_heads", "3", "--attention_threshold", "1"]

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


def without_term(settings, chosen, tokens, ratio, *more):
    _, parts = total_loss(settings, chosen, tokens, ratio.detach(), *more)
    plain = settings.gamma * parts["sft"] + settings.dpo_alpha * parts["dpo"]
    return plain.mean(), parts | {"total": plain}
