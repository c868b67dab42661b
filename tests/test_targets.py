"""Prompts about several images: one region in training, answers and steering, against eager attention."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from llava import answering
from llava.adaptviz import AdaptViz, Bands
from llava.asked import in_digests, target_fields
from llava.attention import install
from llava.generation import batch_prompts, generate
from llava.heatmap import OUTLINE, STRIP
from llava.records import parse_question
from llava.regions import pointed_at, prompt_regions
from llava.vlm import open_model
from scripts.viewer.answers import fields_of
from scripts.viewer.cards import parts
from tests.conftest import BASE, SIDE, encoded, preference, tiny_model
from tests.test_data import setting  # noqa: F401  a fixture
from tests.test_packing import LAYERS, eager_twin, separate
from tests.test_scaling import KV_HEADS, STEPS, TOKENS, Naive, Recorder, naive_answer, prompts_of
from train.llava_hound_dpo.packing import pack
from train.llava_hound_dpo.scoring import score

THREE = "Image1:<image>\nImage2:<image>\nImage3:<image>\n"
SEQUENCE = {"image": ["a.png", "b.png", "c.png"], "prompt": THREE + "In Image1 and Image3, what is the colour?"}
COLLAGE = {"image": ["a.png"], "prompt": "<image>\nIn Images 1 and 4, what is the colour?", "grid": [2, 2]}
SEARCH = {**SEQUENCE, "prompt": THREE + "Which images show a ring?", "targets": [1, 3], "is_search": True}


def by_hand(name):
    """1 for every image token that is asked about: two whole images, or two opposite quarters of 6 x 6 patches."""
    if name == "sequence":
        return torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(TOKENS)
    quarters = torch.zeros(6, 6)
    quarters[:3, :3] = quarters[3:, 3:] = 1
    return quarters.flatten()


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def vlm():
    return open_model(BASE, batch_size=4)


def asked(record):
    """What `ask` takes of a record."""
    fields = {name: value for name, value in record.items() if name != "image"}
    return {"pictures": [noise(n) for n in range(len(record["image"]))], "max_new_tokens": 6, **fields}


# ---- the mass on the set


@pytest.mark.parametrize("name", ["sequence", "collage"])
def test_the_ratio_of_an_answer_is_that_of_eager_attention_summed_over_its_targets(vlm, name):
    """Generated, and the same answer given: per layer, over the answer's rows and all heads."""
    record = {"sequence": SEQUENCE, "collage": COLLAGE}[name]
    reply = vlm.ask(**asked(record), attention_layers="all")
    given = asked(record) | {"answer": reply.text, "attention_layers": "all"}
    eager = LlavaForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    assert reply.is_complete
    text = vlm.family.render([(record["prompt"], reply.text)])
    ids = vlm.family.processor()(text=text, images=reply.pictures, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        maps = eager(input_ids=ids, **vlm.family.pixels(reply.pictures), output_attentions=True).attentions
    rows = torch.stack(maps)[:, 0, :, -1 - reply.record["num_tokens"] : -1].mean(dim=(1, 2))
    on_images = rows[:, ids[0] == eager.config.image_token_id]
    wanted = (on_images * by_hand(name)).sum(dim=-1) / on_images.sum(dim=-1)
    assert wanted.min() > 0.1 and wanted.max() < 0.99
    for own in (reply, vlm.look(**given)):
        assert own.ratio_by_layer == pytest.approx(wanted.tolist(), abs=1e-5)
        assert own.ratio == pytest.approx(wanted.mean().item(), abs=1e-5)
        outer = (own.shares[0], own.shares[-1])
        assert sum(outer) == pytest.approx(own.ratio, abs=1e-5) and sum(own.shares) == pytest.approx(1, abs=1e-5)


def test_the_mass_in_a_packed_row_is_that_of_eager_attention_summed_over_the_targets(setting, model, processor):  # noqa: F811
    """Of a pair about two images, one about two cells, and one that looks for two images, in one row."""
    eager, records = eager_twin(model, processor), []
    for number, record in enumerate((SEQUENCE, COLLAGE, SEARCH)):
        own = preference(number, len(record["image"]))
        records.append(own | {name: value for name, value in record.items() if name != "image"})
    dataset = setting.dataset(setting.pairs(*records))
    items = [dataset[number] for number in range(3)]
    pixels = [item["pixels"]["pixel_values"] for item in items]
    row = pack([item["pair"] for item in items], model.config.image_token_id)
    with torch.no_grad():
        found = score(model, row, encoded(model, torch.cat(pixels)), layers=LAYERS).masses
        for number, (item, own) in enumerate(zip(items, pixels, strict=True)):
            _, maps = separate(eager, item["pair"].prompt, item["pair"].chosen, own)
            on_images = torch.stack(maps)[..., torch.tensor(item["pair"].prompt) == model.config.image_token_id]
            target = by_hand("collage" if number == 1 else "sequence")
            wanted = torch.stack([(on_images * target).sum(dim=-1), on_images.sum(dim=-1)], dim=-1).mean(dim=(1, 2))
            torch.testing.assert_close(found[:, number], wanted, atol=2e-6, rtol=1e-4)


# ---- AdaptViz


@pytest.mark.parametrize("scope", ["target", "balance"])
@pytest.mark.parametrize("kv_heads", KV_HEADS.values(), ids=KV_HEADS)
def test_steering_scales_the_tokens_of_both_targets_and_of_no_search(processor, family, kv_heads, scope):
    """Against scores scaled by hand on the first and third image; a prompt that looks for its image is plain."""
    ours, other = (tiny_model(processor, num_key_value_heads=kv_heads) for _ in range(2))
    install(ours)
    naive, recorder = Naive(), Recorder()
    other.set_attn_implementation({"text_config": "naive"})
    _, three, two = prompts_of(ours)
    search = SEARCH | {"image": ["a.png", "b.png"], "prompt": SEARCH["prompt"].partition("Image3")[0] + "Which?"}
    records = [parse_question(r | {"answer": "x"}, "") for r in (SEQUENCE, search | {"targets": [2]})]
    images = [[family.image((SIDE, SIDE))] * len(record.images) for record in records]
    regions = [prompt_regions(*both) for both in zip(records, images, strict=True)]
    pixels = {"pixel_values": torch.cat([three[2], two[2]])}
    pointed = [pointed_at(record) for record in records]
    batch = batch_prompts(family, [three[0], two[0]], [()] * 2, regions, pixels, pointed)
    steer = AdaptViz(scope, bands=Bands.fixed(2.5)).steer
    answers = generate(ours, family, batch, [1], steer, max_new_tokens=STEPS, logits_processor=[recorder])
    assert [answer.factor for answer in answers] == [2.5, 1.0]
    for row, ((prompt, _, own), alpha) in enumerate(((three, 2.5), (two, 1.0))):
        weights = by_hand("sequence") if row == 0 else torch.zeros(2 * TOKENS)
        settings = {"alpha": alpha, "rule": "multiply", "every_step": False, "keeps_mass": scope == "balance"}
        tokens, scores = naive_answer(other, naive, prompt, weights, own, 0, **settings)
        assert answers[row].tokens == tokens
        for step, wanted in enumerate(scores):
            torch.testing.assert_close(recorder.scores[step][row], wanted[0], atol=1e-5, rtol=1e-4)


def test_a_search_is_asked_and_not_steered_from_python(vlm):
    with pytest.raises(ValueError, match=r"prompt 1: no image is referred to, nor in any other question.*scope all"):
        vlm.ask(**asked(SEARCH), steer="target")
    assert vlm.ask(**asked(SEARCH), steer=AdaptViz("all", bands=Bands.fixed(1.5))).scale == 1.5
    both = [asked(record) for record in (SEARCH, SEQUENCE)]
    columns = {name: [one.get(name) for one in both] for name in ("pictures", "prompt", "targets", "is_search")}
    replies = vlm.ask(**columns, max_new_tokens=6, steer=AdaptViz(bands=Bands.fixed(1.5)))
    assert [reply.scale for reply in replies] == [1.0, 1.5]
    plain = vlm.ask(**asked(SEARCH))
    assert replies[0].text == plain.text and replies[0].ratio == pytest.approx(plain.ratio, abs=1e-5)


# ---- records, drawings, digests


def test_a_reply_knows_its_targets_and_outlines_them(vlm):
    reply, search = vlm.ask(**asked(SEQUENCE)), vlm.ask(**asked(SEARCH))
    for own in (reply, search):
        assert own.target is None and (own.record["target"], own.record["targets"]) == (None, [1, 3])
        assert [part["is_target"] for part in parts(own)] == [True, False, True]
        again = vlm.ask(own.pictures, own.question.prompt, max_new_tokens=6, **fields_of(own.question))
        assert again.question.targets == (0, 2) and again.ratio == own.ratio
    assert search.record["is_search"] is True and "is_search" not in reply.record
    sheet = reply.heatmap(100)
    assert [sheet.getpixel((x, STRIP + 50)) == OUTLINE for x in (2, 110, 218)] == [True, False, True]
    cells = vlm.ask(**asked(COLLAGE)).heatmap(100)
    assert [cells.getpixel(place) == OUTLINE for place in ((2, 25), (52, 25), (2, 75), (52, 75))] == [1, 0, 0, 1]


def test_what_is_written_of_one_target_and_its_digests_are_as_ever(vlm):
    """Unfinished folders go on, and tuned questions are known again: these are digests of before there were sets."""
    red = Image.new("RGB", (SIDE, SIDE), "red")
    pictures, prompts = [[red, red], [red, red], [red]], ["In Image2, what?", "What?", "In Image1, what?"]
    job, _ = vlm._job(pictures, prompts, {"grid": [None, None, [2, 2]]})
    assert answering.identify(job)["questions"] == "3 (b16c2c66c0cdca27)"
    one = {"id": "q", "image": ["a.png", "b.png"], "prompt": "<image><image>\nIn Image2, what?", "answer": "red"}
    none = {**one, "id": "m", "prompt": "<image><image>\nWhat?", "image_type": "multi"}
    questions = [parse_question(record, "x record 1") for record in (one, none)]
    assert [answering.digest_of(question) for question in questions] == ["90ffba2a34dc9d3f", "c4e9584a4402600b"]
    assert target_fields((1,)) == {"target": 2} and target_fields(()) == {"target": None}
    assert in_digests((1,)) == 1 and in_digests(()) is None and in_digests((0, 2)) == (0, 2)
    both = [answering.digest_of(parse_question(SEQUENCE | {"answer": "x", "target": t}, "")) for t in (None, 1, 3)]
    assert len(set(both)) == 3
