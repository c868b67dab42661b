"""FLOPs and hours of training: against hand computation, and against the published analysis of packed rows."""

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from train.llava_hound_dpo.costs import PairShape, Recipe, count, filling_flops, hours, work
from train.llava_hound_dpo.memory import GIB, Memory
from train.llava_hound_dpo.plan import cost

BLOCKS = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # linear weights of LLaVA-1.5-7B's language model
LORA_128 = 319_815_680


@pytest.fixture(scope="module")
def config_7b():
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000, vision_feature_layer=-2)


@pytest.fixture(scope="module")
def costs(config_7b):
    return count(config_7b)


def pair_of(images):
    """Answers of 75 tokens after a prompt of 60 beside its pictures, as in the published analysis."""
    return PairShape(576 * images + 60, 75, (75,), 576 * images, (577,) * images)


# ---- the formulas


@pytest.mark.parametrize(
    ("images", "tokens", "forward", "at_every_step", "cached"),
    [
        (1, 786, 10.8, 42.1, 31.7),
        (2, 1362, 19.0, 74.2, 56.0),
        (3, 1938, 27.3, 107.1, 81.0),
        (4, 2514, 35.9, 141.1, 106.8),
        (5, 3090, 44.6, 176.0, 133.4),
    ],
)
def test_the_table_of_the_analysis(costs, images, tokens, forward, at_every_step, cached):
    """TFLOP of a LoRA step with checkpointing, the adapter itself not counted."""
    shape = pair_of(images)
    fly, stored = (work(costs, [shape], Recipe(reference)) for reference in ("step", "cache"))
    assert shape.tokens == tokens
    assert round((fly.pictures + fly.forward) / 1e12, 1) == forward
    assert round(fly.total / 1e12, 1) == at_every_step and round(stored.total / 1e12, 1) == cached


def test_parts_by_hand(costs):
    """One picture, answers of 10 and 20 tokens after 700 shared ones."""
    shape = PairShape(700, 10, (20,), 576, (577,))
    attended = 700**2 / 2 + 10 * 700 + 50 + 20 * 700 + 200
    assert shape.attended_pairs == attended and costs.token == 2 * BLOCKS
    linear, attention, head = 2 * BLOCKS * 730, 4 * 4096 * 32 * attended, 2 * 4096 * 32064 * 30
    tower = 24 * (2 * 577 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 577**2 * 1024) + 2 * 577 * 588 * 1024
    projector = 2 * 576 * (1024 * 4096 + 4096**2)
    assert (costs.tower(shape), costs.projector(shape)) == (tower, projector)
    adapter = 2 * LORA_128 * 730
    lora = work(costs, [shape], Recipe("step", LORA_128))
    assert vars(lora) == pytest.approx({
        "pictures": tower + projector,
        "forward": linear + attention + head + adapter,
        "recomputed": linear + attention + adapter,
        "backward": linear + head + 2 * adapter + 2.5 * attention,
        "reference": linear + attention + head,
    })  # fmt: skip
    full, again = (work(costs, [shape], Recipe("cache", 0, is_lora=False, checkpointing=on)) for on in (False, True))
    assert full.backward == pytest.approx(2 * (linear + head) + 2.5 * attention)
    assert full.recomputed == full.reference == 0
    assert again.recomputed == pytest.approx(linear + attention - 32 * 2 * 4096 * 11008 * 730)
    assert filling_flops(costs, [shape]) == pytest.approx(tower + projector + linear + attention + head)


def test_a_trained_projector_sees_the_pictures_twice_unless_the_reference_is_cached(costs):
    shape = pair_of(2)
    frozen, fly, cached = (
        work(costs, [shape], Recipe(reference, trains_projector=trains)).pictures
        for reference, trains in (("step", False), ("step", True), ("cache", True))
    )
    assert fly == 2 * frozen and cached == frozen


def test_grouped_keys_count_as_they_are(config_7b):
    """Two key heads of four: key and value projections are half as large."""
    text = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
                       num_key_value_heads=2, vocab_size=10)  # fmt: skip
    config = LlavaConfig(vision_config=config_7b.vision_config, text_config=text, image_token_index=9)
    assert count(config).token == 2 * 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    assert count(config).attended == 4 * 8 * 3  # every query head attends all the same


def test_the_probe_is_a_second_attention_call_of_the_chosen_rows(costs):
    """9 of 32 layers: 2 x 2 x width for every (query, key) pair of the chosen answer; again when recomputed, 2.5 x
    backward; never for the reference."""
    shape, probed = PairShape(700, 10, (20,), 576, (577,)), 9 * 4 * 4096 * (10 * 700 + 50)
    without, probing = (vars(work(costs, [shape], Recipe(probed_layers=n))) for n in (0, 9))
    added = {name: probing[name] - without[name] for name in probing}
    assert added == {
        "pictures": 0, "forward": probed, "recomputed": probed, "backward": 2.5 * probed, "reference": 0,
    }  # fmt: skip


def test_an_epoch_is_the_sum_of_its_pairs(costs):
    shapes = [pair_of(1), pair_of(3), PairShape(30, 4, (), 0, ())]
    total = work(costs, shapes, Recipe())
    assert total.total == pytest.approx(sum(work(costs, [shape], Recipe()).total for shape in shapes))


def test_hours_by_hand():
    assert hours(3600 * 312e12, 1, 1.0) == 1 and hours(3600 * 312e12, 8, 0.4) == pytest.approx(1 / 3.2)


# ---- the rows of the plan


def rows(costs, **changes):
    settings = {"shapes": [pair_of(3)] * 1000, "recipe": Recipe(), "epochs": 3, "batch": 64, "per_device": 1,
                "utilization": 0.4}  # fmt: skip
    return cost(
        costs, memory=lambda gpus: Memory(32 * GIB / gpus, 0, 0, host=GIB * (gpus == 1)), **settings | changes
    )


def test_rows_by_hand(costs):
    """1,000 pairs of 107.1 TFLOP in three epochs at 0.4 x 312 TFLOP/s: 0.715 hours of one GPU."""
    found = rows(costs)
    assert found["tokens"].startswith("1,938,000 per epoch, 1,938 a pair")
    assert found["FLOPs"].startswith("107.1 TFLOP a pair") and "6.696 PFLOP a step of 62.5 pairs" in found["FLOPs"]
    assert found["1 A100"].startswith(
        "0.715 hours, 0.7154 GPU-hours, 32.0 GiB and 1.0 GiB of the CPU's each"
    )
    assert found["8 A100s"].startswith("0.0894 hours, 0.7154 GPU-hours, 4.0 GiB each; ")
    assert found["64 A100s"].endswith("--gradient_accumulation_steps 1 keeps the batch")
    assert "not measured" in found["assumed"]


def test_filling_the_cache_is_paid_once(costs):
    """It takes a forward pass more in the first epoch, and so pays from the second on."""
    fly, cached = (
        [float(rows(costs, recipe=Recipe(reference), epochs=epochs)["1 A100"].split()[0]) for epochs in (1, 2, 3)]
        for reference in ("step", "cache")
    )
    assert cached[0] > fly[0] and cached[1] < fly[1] and fly[2] - cached[2] > fly[1] - cached[1]


@pytest.mark.parametrize(("batch", "shares"), [(48, [True, True, True, False]), (30, [True, True, False, False])])
def test_a_batch_that_has_no_equal_shares_is_named(costs, batch, shares):
    found = rows(costs, batch=batch)
    names = ("1 A100", "2 A100s", "8 A100s", "64 A100s")
    assert ["keeps the batch" in found[name] for name in names] == shares
    assert all(("no equal shares" in found[name]) != has for name, has in zip(names, shares, strict=True))


def test_a_moment_is_not_written_as_a_power_of_ten(costs):
    found = rows(costs, shapes=[PairShape(1, 1, (), 0, ())])["1 A100"]
    assert found.startswith("under 0.001 hours, under 0.001 GPU-hours")
