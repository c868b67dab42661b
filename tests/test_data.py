"""From records to checked pairs, and from pairs to items and batches."""

import copy
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from llava.checks import check_pictures
from llava.image import ImageStore
from llava.records import FORMATS, DataError, read_preferences
from tests.conftest import preference
from train.llava_hound_dpo.data import (
    PairCollator,
    PairDataset,
    PairReader,
    describe,
    read_leave_out,
    split,
    tokenize,
    within_length,
)

TOKENS = 36  # per image of the miniature


@pytest.fixture
def setting(family, data):
    """What the functions under test take, and `pairs(records)` from dicts to tokenised pairs."""
    store = ImageStore(data.images)

    def pairs(*records):
        return tokenize(read_preferences(data(list(records))), family, None)

    return SimpleNamespace(
        pairs=pairs, data=data, family=family, store=store, image_token=family.image_id, tokenizer=family.tokenizer,
        images=data.images, dataset=lambda pairs: PairDataset(pairs, store, family),
    )  # fmt: skip


def problems(call, *arguments) -> list[str]:
    with pytest.raises(DataError) as caught:
        call(*arguments)
    assert str(caught.value).startswith(caught.value.problems[0])
    return caught.value.problems


# ---- tokenize


def test_token_ids_of_a_pair(setting):
    (pair,) = setting.pairs(preference(num_images=3, target=2))
    tokenizer = setting.tokenizer
    assert pair.prompt.count(setting.image_token) == 3
    (rejected,) = pair.rejected
    assert tokenizer.decode(pair.chosen).strip() == "green</s>" and tokenizer.decode(rejected).strip() == "blue</s>"


def test_num_tokens_counts_images_and_the_longer_answer(setting):
    """By hand: the prompt with 36 tokens an image instead of one, and the longer of two answers."""
    (pair,) = setting.pairs(preference(chosen="red", rejected="a rather long green answer"))
    assert len(pair.rejected[0]) > len(pair.chosen)
    text = len(pair.prompt) - 2
    assert pair.num_tokens == text + 2 * 36 + len(pair.rejected[0])


class WithoutCapitals:
    """A tokenizer that reads "Red" and "red" alike."""

    def __init__(self, tokenizer):
        self.tokenizer, self.convert_tokens_to_ids = tokenizer, tokenizer.convert_tokens_to_ids

    def __call__(self, text):
        return self.tokenizer(text.lower())


def test_records_that_tokenise_badly_are_all_listed(setting):
    same = {"chosen": "Red", "rejected": "red"}
    records = [pair.record for pair in setting.pairs(preference(0), preference(1, **same), preference(2, **same))]
    family = copy.copy(setting.family)
    family.tokenizer = WithoutCapitals(setting.tokenizer)
    found = problems(tokenize, records, family, None)
    assert len(found) == 2 and all("same tokens" in problem for problem in found)
    assert "train.json record 2 (id pair_1)" in found[0] and "train.json record 3 (id pair_2)" in found[1]


def test_special_tokens_in_a_record_are_listed_with_it(setting):
    """The model would read them as its own: refused in prompts and answers, record by record."""
    prompt = "Image1:<image>\nImage2:<image>\nIn Image2, </s>?"
    change = {"chosen": "red<unk>"}, {"rejected": "<s>blue"}, {"prompt": prompt}
    records = read_preferences(setting.data([preference(n, **own) for n, own in enumerate(change)]))
    found = problems(tokenize, records, setting.family, None)
    assert [problem.split("(id ")[1].split(")")[0] for problem in found] == ["pair_0", "pair_1", "pair_2"]
    for problem, token in zip(found, ("<unk>", "<s>", "</s>"), strict=True):
        assert repr(token) in problem


# ---- within_length


@pytest.fixture
def short_and_long(setting):
    return setting.pairs(preference(0, 1), preference(1, 4), preference(2, 2), preference(3, 5))


def test_pairs_at_the_limit_fit(short_and_long):
    limit = max(pair.num_tokens for pair in short_and_long)
    assert within_length(short_and_long, limit, "error") == (short_and_long, [])


def test_every_overlong_pair_is_listed(short_and_long):
    found = problems(within_length, short_and_long, short_and_long[2].num_tokens, "error")
    assert len(found) == 2
    for problem, number, images in zip(found, (1, 3), (4, 5), strict=True):
        assert f"train.json record {number + 1} (id pair_{number})" in problem and f"{images} images" in problem
        assert str(short_and_long[number].num_tokens) in problem and "--overlong drop" in problem


def test_overlong_pairs_are_dropped_and_logged_but_never_cut(short_and_long, caplog):
    caplog.set_level(logging.INFO, logger="train.llava_hound_dpo.data")
    before = [list(pair.prompt) for pair in short_and_long]
    fitting, dropped = within_length(short_and_long, short_and_long[2].num_tokens, "drop")
    assert [pair.record.id for pair in fitting] == ["pair_0", "pair_2"]
    assert [pair.record.id for pair in dropped] == ["pair_1", "pair_3"]
    assert [pair.prompt for pair in short_and_long] == before
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and "record 2 (id pair_1)" in lines[0] and "record 4 (id pair_3)" in lines[1]


@pytest.mark.parametrize("overlong", ["error", "drop"])
def test_nothing_that_fits_is_an_error(short_and_long, overlong):
    assert len(problems(within_length, short_and_long, 10, overlong)) == 4


# ---- check_pictures


def records_of(pairs):
    return [pair.record for pair in pairs]


def damage(setting, name, how):
    path = setting.images / name
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        Image.effect_noise((90, 90), 80).convert("RGB").save(path)
        path.write_bytes(path.read_bytes()[:-2000])
    else:
        path.write_text("<html>404</html>")


@pytest.mark.parametrize(
    ("how", "depths"),
    [("missing", ["full", "header", "exists"]), ("truncated", ["full"]), ("text", ["full", "header"])],
)
def test_a_bad_picture_is_named_with_its_record(setting, how, depths):
    pairs = setting.pairs(preference(0), preference(2))  # red and green; blue and yellow
    damage(setting, "yellow.png", how)
    for depth in ("full", "header", "exists"):
        if depth in depths:
            (found,) = problems(check_pictures, records_of(pairs), setting.store, setting.family, depth)
            assert "train.json record 2 (id pair_2): " in found and "yellow.png" in found
        else:
            check_pictures(records_of(pairs), setting.store, setting.family, depth)


def test_every_record_with_a_bad_picture_is_listed(setting):
    pairs = setting.pairs(*(preference(n) for n in range(5)))  # green is in pairs 0 and 1, white in 3 and 4
    damage(setting, "green.png", "missing")
    damage(setting, "white.png", "text")
    found = problems(check_pictures, records_of(pairs), setting.store, setting.family, "full")
    assert [problem.split("(id ")[1].split(")")[0] for problem in found] == ["pair_0", "pair_1", "pair_3", "pair_4"]


def collage(number, target, image="canvas.png", **changes):
    prompt = f"<image>\nIn Image{target}, what colour is the picture?"
    return preference(number, image=[image], prompt=prompt, **changes)


@pytest.mark.parametrize("depth", ["full", "header"])
def test_a_cell_that_does_not_exist_is_named_with_its_record(setting, depth):
    Image.new("RGB", (936, 488)).save(setting.images / "canvas.png")
    pairs = setting.pairs(collage(0, 2), collage(1, 3), collage(2, 3, grid=[1, 3]), collage(3, 7))
    found = problems(check_pictures, records_of(pairs), setting.store, setting.family, depth)
    assert len(found) == 2
    assert "train.json record 2 (id pair_1): Image3 does not exist" in found[0]
    assert "train.json record 4 (id pair_3): Image7 does not exist" in found[1]


def test_a_box_outside_its_picture_is_named_with_its_record(setting):
    pairs = setting.pairs(collage(0, 1, image="red.png", target_box=[0, 0, 73, 10]))
    (found,) = problems(check_pictures, records_of(pairs), setting.store, setting.family, "header")
    assert "record 1 (id pair_0)" in found and "72 x 72" in found


# ---- split


def test_split_is_a_seeded_partition():
    pairs = [SimpleNamespace(number=n) for n in range(50)]
    train, held_out = split(pairs, 0.2, seed=3)
    assert len(held_out) == 10 and sorted(p.number for p in train + held_out) == list(range(50))
    again, other = split(pairs, 0.2, seed=3), split(pairs, 0.2, seed=4)
    assert again == (train, held_out) and other[1] != held_out
    assert [p.number for p in train] == sorted(p.number for p in train)


def test_nothing_held_out():
    assert split([1, 2, 3], 0.0, seed=0) == ([1, 2, 3], [])


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_split_that_leaves_one_side_empty_is_refused(share):
    with pytest.raises(ValueError, match=f"--eval_split {share} of 3 pairs"):
        split([1, 2, 3], share, seed=0)


# ---- items and batches


def test_item_of_a_sequence(setting):
    item = setting.dataset(setting.pairs(preference(0, 1), preference(1, 3, target=2)))[1]
    pair = item["pair"]
    assert item["index"] == 1 and FORMATS[item["format"]] == "sequence"
    (pixels,) = item["pixels"].values()
    assert pixels.shape == (3, 3, 72, 72) and pixels.dtype == torch.float32
    assert pair.prompt.count(setting.image_token) == 3 * TOKENS
    assert pair.target.tolist() == [0.0] * 36 + [1.0] * 36 + [0.0] * 36


def test_pictures_of_an_item_are_in_the_records_order(setting):
    """Green, blue, yellow: the channel of largest value tells them apart, whatever the normalisation."""
    item = setting.dataset(setting.pairs(preference(1, 3)))[0]
    means = item["pixels"]["pixel_values"].mean((2, 3))
    assert [means[0].argmax(), means[1].argmax(), means[2].argmin()] == [1, 2, 2]


def test_item_of_a_collage_uses_the_pictures_size(setting):
    Image.new("RGB", (144, 72)).save(setting.images / "canvas.png")
    item = setting.dataset(setting.pairs(collage(0, 2, grid=[1, 2])))[0]
    weights = item["pair"].target.reshape(6, 6)  # padded to 144 x 144: rows 36..108, the right half
    wanted = torch.zeros(6, 6)
    wanted[1:5, 3:] = torch.tensor([0.5, 1.0, 1.0, 0.5])[:, None]
    assert FORMATS[item["format"]] == "collage" and torch.equal(weights, wanted)


def test_a_picture_gone_since_the_check_is_named(setting):
    dataset = setting.dataset(setting.pairs(preference(0)))
    damage(setting, "green.png", "missing")
    with pytest.raises(DataError, match=r"record 1 \(id pair_0\).*green\.png"):
        dataset[0]


@pytest.mark.parametrize("needs_rejected", [True, False])
def test_batch(setting, needs_rejected):
    dataset = setting.dataset(setting.pairs(preference(0, 2), preference(1, 3), preference(2, 1, image_type="single")))
    items = [dataset[0], dataset[1], dataset[2]]
    batch = PairCollator(setting.family, needs_rejected)(items)
    row, pairs = batch["row"], [item["pair"] for item in items]
    assert next(iter(batch)) == "index" and batch["index"].tolist() == [0, 1, 2]
    assert batch["pixels"]["pixel_values"].shape == (6, 3, 72, 72)
    assert [FORMATS[number] for number in batch["format"]] == ["sequence", "sequence", "single"]
    assert (row.input_ids == setting.image_token).sum() == 6 * TOKENS and row.num_pairs == 3
    labels = [token for p in pairs for token in p.chosen + (p.rejected[0] if needs_rejected else [])]
    assert row.labels.tolist() == labels
    assert row.branch.unique().tolist() == ([0, 1, 2, 3, 4, 5] if needs_rejected else [0, 1, 2])


def test_dataset_length_and_order(setting):
    dataset = setting.dataset(setting.pairs(preference(0), preference(1)))
    assert len(dataset) == 2 and [dataset[n]["index"] for n in range(2)] == [0, 1]


# ---- describe


def test_describe(setting):
    Image.new("RGB", (936, 488)).save(setting.images / "canvas.png")
    pairs = setting.pairs(preference(0, 2), preference(1, 3), preference(2, 3), collage(3, 1))
    lengths = sorted(pair.num_tokens for pair in pairs)
    found = describe(pairs)
    assert found["pairs"] == 4 and found["by_format"] == {"sequence": 3, "collage": 1}
    assert list(found["by_images"].items()) == [(1, 1), (2, 1), (3, 2)]
    assert (found["tokens"]["min"], found["tokens"]["max"]) == (lengths[0], lengths[-1])
    assert found["tokens"]["median"] in lengths[1:3]
    json.dumps(found)


# ---- bad records


@pytest.fixture
def partly_bad(setting, tmp_path):
    """Records of which one lacks a field, one does not tokenise, one has a broken picture and one is too long."""
    records = [preference(number, 2) for number in range(6)] + [preference(6, 5)]
    del records[1]["chosen"]
    records[2]["chosen"] = "red<unk>"
    (setting.images / "broken.png").write_bytes(b"no picture")
    records[3]["image"] = [records[3]["image"][0], "broken.png"]
    return setting.data(records)


def reader(setting, **options):
    return PairReader(setting.family, setting.store, max_length=200, overlong="drop", **options)


def test_bad_records_stop_the_run_unless_they_may_be_dropped(setting, partly_bad):
    assert [line.split(": ")[0].rpartition("/")[2] for line in problems(reader(setting).read, partly_bad)] == [
        "train.json record 2 (id pair_1)"
    ]
    pairs, dropped = reader(setting, bad_records="drop").read(partly_bad)
    assert [pair.record.id for pair in pairs] == ["pair_0", "pair_4", "pair_5"]
    found = [(line.split("(id ")[1].split(")")[0], line.split("): ")[1]) for line in dropped]
    assert [name for name, _ in found] == ["pair_1", "pair_2", "pair_3", "pair_6"]
    for (_, reason), words in zip(found, ("`chosen` is missing", "<unk>", "broken.png", "too long"), strict=True):
        assert words in reason


def test_records_left_out_are_not_looked_at(setting, partly_bad, tmp_path):
    listed = tmp_path / "bad.json"
    listed.write_text(json.dumps(["pair_1", "record 3", "pair_3", "nobody"]))
    pairs, dropped = reader(setting, leave_out=read_leave_out(listed)).read(partly_bad)
    assert [pair.record.id for pair in pairs] == ["pair_0", "pair_4", "pair_5"] and len(dropped) == 1
    listed.write_text("[3]")
    with pytest.raises(DataError, match="list of record ids"):
        read_leave_out(listed)


def test_nothing_left_is_an_error(setting, partly_bad):
    everything = frozenset(f"pair_{number}" for number in range(7))
    with pytest.raises(DataError, match="no record"):
        reader(setting, leave_out=everything).read(partly_bad)
