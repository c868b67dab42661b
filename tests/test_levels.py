"""Prompts that compare two pictures or look for one: what they say against the scenes that were drawn."""

import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from data_gen.correctness import is_right, numbers_in
from data_gen.gen_chosen_rejected import __main__ as gen_chosen_rejected
from data_gen.gen_chosen_rejected.others import Truth, other_image, repointed, truths
from data_gen.gen_chosen_rejected.rules import THRESHOLDS, Candidate, Rules, judge
from data_gen.gen_instruction.levels import compared, searched
from data_gen.gen_instruction.output import Output
from data_gen.sources import Source
from inference.llava_hound_dpo.evaluate import evaluate
from llava.order import permuted, why_fixed
from llava.records import parse_preference, parse_question, read_instructions
from scripts.miniature import make_data, make_source
from scripts.miniature.make_data import preference, question
from scripts.miniature.prompts import COMPARE, SEARCH, sample_prompt
from tests.conftest import BASE
from tests.single_images import digest, generate, generate_test_set, lines, record, save_pictures, turns, world, write

NAMES = r"In Image(\d+)(?: and Image(\d+))?, what is the (\w+)\?"
SOUGHT = r'Which image has the (\w+) (\w+)\?|"What is the (\w+)\?" For which image is the answer "(\w+)"\?'
NUM_SCENES, GROUP = 90, 30


def truth(text, scenes):
    """(the true answer, the 1-based pictures that it is about), read off the scenes alone."""
    if named := re.search(NAMES, text):
        numbers = [int(number) for number in named.groups()[:2] if number]
        return " and ".join(getattr(scenes[number - 1], named[3]) for number in numbers), numbers
    attribute, value = filter(None, re.search(SOUGHT, text).groups())
    (number,) = [place for place, scene in enumerate(scenes, 1) if getattr(scene, attribute) == value]
    return str(number), [number]


def parsed(raw):
    return (parse_preference if "chosen" in raw else parse_question)(raw, "x.json record 1")


# ---- the miniature's own maker


def made(of, level, image_type, number):
    """(prompt, record) of random scenes."""
    rng = np.random.default_rng([number, level])
    prompt = sample_prompt(rng, "train", image_type, level=level)
    names = [str(place) for place in range(len(prompt.pictures()))]
    return prompt, {"id": str(number), "image": names} | of(prompt, rng)


@pytest.mark.parametrize("image_type", ["sequence", "collage"])
@pytest.mark.parametrize("level", [COMPARE, SEARCH])
def test_the_makers_answers_are_true_and_the_others_false(level, image_type):
    kinds = Counter()
    for number in range(100):
        prompt, raw = made(question, level, image_type, number)
        _, pair = made(preference, level, image_type, number)
        answer, numbers = truth(prompt.text, prompt.scenes)
        assert raw["answer"] == pair["chosen"] == answer and answer not in raw["others"]
        assert pair["rejected"] in raw["others"] and len(set(raw["others"])) == len(raw["others"])
        assert [target + 1 for target in parsed(raw).targets] == numbers and parsed(raw).is_search == (level == SEARCH)
        assert "target_box" not in raw or level == SEARCH
        if level == COMPARE:
            values = [getattr(scene, prompt.attribute) for scene in prompt.scenes]
            pairs = {" and ".join(two) for two in itertools.permutations(values, 2)}
            assert set(raw["others"]) <= pairs and numbers == sorted(numbers) and len(set(answer.split())) == 3
            is_swapped = pair["rejected"] == " and ".join(reversed(answer.split(" and ")))
            assert (pair["rejected_from"] == "swapped") == is_swapped
        kinds[pair["rejected_from"]] += 1
    assert min(kinds.values()) > 20 and len(kinds) == (2 if level == COMPARE else 1)


@pytest.mark.parametrize("level", [COMPARE, SEARCH])
def test_in_another_order_it_is_still_the_same_question(level):
    rng = np.random.default_rng(0)
    for number in range(100):
        prompt, raw = made(preference, level, "sequence", number)
        order = tuple(map(int, rng.permutation(len(prompt.scenes))))
        assert why_fixed(parsed(raw)) is None
        found = permuted(parsed(raw), order)
        answer, numbers = truth(found.prompt, [prompt.scenes[place] for place in order])
        assert found.chosen == answer and found.rejected != (answer,)
        assert found.targets == tuple(sorted(number - 1 for number in numbers))


def test_levels_take_turns_and_one_alone_writes_what_it_always_did(tmp_path, monkeypatch):
    def make(name, *more):
        words = ["--output", str(tmp_path / name), "--num_train", "30", "--num_test", "30", *more]
        monkeypatch.setattr(sys, "argv", ["make_data", *words])
        make_data.main()
        return {kind: (tmp_path / name / f"{kind}.json").read_bytes() for kind in ("train", "test")}

    before = {kind: hashlib.sha256(data).hexdigest() for kind, data in make("named").items()}
    assert before == {  # of the maker as it was without levels
        "train": "ff19c25d43e4042027e6b65ceedae0ebbe080558896f6acf5b277e4cfd0cf741",
        "test": "2d111ea69a7ee1a05d8b5af98fd8f494a27107b143e6b68148fa7e77962f4bd8",
    }
    levels = json.loads(make("levels", "--levels", "1", "2", "3")["test"])
    assert Counter(own["category"] for own in levels) == {"named": 10, "compare": 10, "search": 10}
    assert {own["image_type"] for own in levels if own["category"] != "named"} == {"sequence", "collage"}
    assert {own["image_type"] for own in levels} == {"sequence", "collage", "pip", "single"}


def test_scores_by_category_know_the_order_and_the_forms_of_a_number(tmp_path):
    prompts = {level: made(question, level, "sequence", 3)[1] for level in (COMPARE, SEARCH)}
    asked = [raw | {"id": str(level), "category": str(level)} for level, raw in prompts.items()]
    (tmp_path / "test.json").write_text(json.dumps(asked))

    def scores(*texts):
        rows = [
            {"question_id": own["id"], "text": text, "num_images": len(own["image"]), **own, "id": None}
            for own, text in zip(asked, texts, strict=True)
        ]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = evaluate([tmp_path / "a.jsonl"], tmp_path / "test.json")[0]["answers"]["a"]["by_category"]
        return [found[name]["accuracy"] for name in ("2", "3")]

    answers = [own["answer"] for own in asked]
    assert scores(*answers) == [1, 1] and scores(asked[0]["others"][0], f"1{answers[1]}") == [0, 0]
    assert scores(answers[0].upper(), f"Image{answers[1]}.") == [1, 1] and scores("red", "Image 9") == [0, 0]


# ---- data_gen, from single pictures


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder of single pictures with questions, and their scenes by path, drawn again from the seed."""
    folder = tmp_path_factory.mktemp("source")
    words = ["--output", str(folder), "--num_pictures", str(NUM_SCENES), "--group_size", str(GROUP)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_source", *words])
        make_source.main()
    rng, scenes = np.random.default_rng([0, 0]), {}
    for number in range(NUM_SCENES):
        scenes[f"train_{number // GROUP:03d}/{number:06d}.png"] = scene = make_source.sample_scene(rng, "train")
        make_source.questions(scene, rng)
    return folder, scenes


def flags(source, *more):
    return ["--source", source[0] / "source.json", "--image_folder", source[0] / "images", *more]


@pytest.fixture(scope="module")
def instructions(source, tmp_path_factory):
    """Folder of a finished mix of formats and levels."""
    out = tmp_path_factory.mktemp("instructions") / "mix"
    with pytest.MonkeyPatch.context() as patch:
        assert generate(patch, *flags(source, "--format", "mix", "--level", "mix", "--output", out,
                                      "--num_records", 270, "--num_workers", 1, "--refusals", 0.05)) == 0  # fmt: skip
    return out


def scenes_of(raw, scenes):
    return [scenes[own["path"]] for own in raw["sources"]]


def test_generated_answers_are_true_of_the_scenes(source, instructions):
    made, count = lines(instructions / "instructions.jsonl"), Counter()
    for raw, asked in zip(made, read_instructions(instructions / "instructions.jsonl"), strict=True):
        count[raw["category"], raw["image_type"]] += 1
        if raw.get("is_refusal") or raw["image_type"] == "pip":
            assert raw["category"] == "named"
            continue
        answer, numbers = truth(asked.prompt, scenes_of(raw, source[1]))
        assert asked.answer == answer and [target + 1 for target in asked.targets] == numbers
        assert asked.is_search == (raw["category"] == "search")
        assert len(numbers) == 1 + (raw["category"] == "compare") and ("others" in raw) == (raw["category"] != "named")
        assert len(set(own["path"] for own in raw["sources"])) == len(raw["sources"])
        assert len({own["path"].split("/")[0] for own in raw["sources"]}) == 1, "companions are of the subset"
        assert ("target_box" in raw) == (raw["image_type"] == "collage" and len(numbers) == 1)
    levels = ("named", "compare", "search")
    assert all(count[level, image_type] > 15 for level in levels for image_type in ("sequence", "collage"))
    places = Counter(tuple(raw["targets"]) for raw in made if raw.get("targets"))
    assert {number for pair in places for number in pair} >= {1, 2, 3, 4, 5} and all(a < b for a, b in places)


@pytest.mark.parametrize("level", ["search", "mix"])
def test_questions_of_test_sets_are_true_of_the_scenes(source, tmp_path, monkeypatch, level):
    words = flags(source, "--level", level, "--output", tmp_path, "--num_per_format", 9, "--num_workers", 1)
    assert generate_test_set(monkeypatch, *words) == 0
    for image_type in ("sequence", "collage"):
        made = json.loads((tmp_path / f"{image_type}_test_images.json").read_text())
        for raw in made:
            asked = parsed(raw)
            answer, numbers = truth(asked.prompt, scenes_of(raw, source[1]))
            assert asked.answer == answer and [target + 1 for target in asked.targets] == numbers
            assert answer not in raw.get("others", ()) and asked.is_search == (raw["category"] == "search")
        count = Counter(raw["category"] for raw in made)
        assert count == ({"search": 9} if level == "search" else dict.fromkeys(("named", "compare", "search"), 3))
    assert {raw["category"] for raw in json.loads((tmp_path / "pip_test_images.json").read_text())} == {"named"}


def test_rejected_answers_are_false_of_the_scenes(source, instructions, tmp_path, monkeypatch):
    words = ["--instructions", instructions / "instructions.jsonl", "--image_folder", instructions / "images",
             "--output", tmp_path / "pairs", "--rejected", "other_image", "--source", source[0] / "source.json",
             "--repoint"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["gen_chosen_rejected", *map(str, words)])
    gen_chosen_rejected.main()
    pairs, kinds = json.loads((tmp_path / "pairs/pairs.json").read_text()), Counter()
    for raw in pairs:
        pair, scenes = parsed(raw), scenes_of(raw, source[1])
        kinds[raw["rejected_from"]] += 1
        if pair.image_type == "pip":
            continue
        answer, numbers = truth(pair.prompt, scenes)
        (rejected,) = pair.rejected
        assert pair.chosen == answer != rejected and [target + 1 for target in pair.targets] == numbers
        if raw["rejected_from"] == "other_number":
            assert pair.is_search and rejected.isdecimal() and 1 <= int(rejected) <= len(scenes)
        if raw["rejected_from"] in ("swapped", "other_pair"):
            attribute = re.search(NAMES, pair.prompt)[3]
            found = [" and ".join(two) for two in itertools.permutations([getattr(s, attribute) for s in scenes], 2)]
            is_swapped = rejected == " and ".join(reversed(answer.split(" and ")))
            assert rejected in found and is_swapped == (raw["rejected_from"] == "swapped")
        if pair.is_search and pair.image_type == "sequence":
            turned = permuted(pair, range(len(scenes))[::-1])
            assert truth(turned.prompt, scenes[::-1])[0] == turned.chosen != turned.rejected[0]
    assert min(kinds[kind] for kind in ("swapped", "other_pair", "other_number", "other_image", "repointed")) >= 8


def test_pairs_of_the_questions_of_other_pairs(instructions, tmp_path, monkeypatch, capsys):
    def make(name, *more):
        words = ["--instructions", instructions / "instructions.jsonl", "--image_folder", instructions / "images",
                 "--output", tmp_path / name, "--rejected", "other_image", *more]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["gen_chosen_rejected", *map(str, words)])
        gen_chosen_rejected.main()
        return json.loads((tmp_path / name / "pairs.json").read_text())

    some = make("all")[::5]
    (tmp_path / "some.json").write_text(json.dumps(some))
    assert len(some) > 20 and make("same", "--same_as", tmp_path / "some.json") == some
    (tmp_path / "some.json").write_text(json.dumps([some[0] | {"id": "another"}]))
    with pytest.raises(SystemExit):
        make("none", "--same_as", tmp_path / "some.json")
    assert "some.json: none of its pairs is about a question of" in capsys.readouterr().err


def test_a_models_own_answers_are_rejected_where_they_are_false(source, instructions, tmp_path, monkeypatch):
    some = [raw for raw in lines(instructions / "instructions.jsonl") if raw["image_type"] == "sequence"][:60]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(raw) + "\n" for raw in some))
    words = ["--instructions", tmp_path / "some.jsonl", "--image_folder", instructions / "images", "--output",
             tmp_path / "pairs", "--model_name_or_path", BASE, "--max_new_tokens", 4, "--num_workers", 0,
             "--source", source[0] / "source.json", "--attention_layers", 3]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["gen_chosen_rejected", *map(str, words)])
    gen_chosen_rejected.main()
    pairs, scenes = json.loads((tmp_path / "pairs/pairs.json").read_text()), {}
    scenes = {raw["id"]: scenes_of(raw, source[1]) for raw in some}
    for pair in pairs:
        answer, _ = truth(pair["prompt"], scenes[pair["id"]])
        assert pair["chosen"] == answer and not set(pair["rejected"].split()) & set(answer.split())
    dropped = lines(tmp_path / "pairs/dropped.jsonl")
    assert {pair["category"] for pair in pairs} >= {"named", "compare"} and len(pairs) + len(dropped) == len(some)
    assert {line["reason"] for line in dropped} >= {"right", "undecided"}


class Killed(BaseException):
    """Ends a run as abruptly as can be within a process."""


def test_the_same_bytes_with_two_workers_and_after_a_kill(source, instructions, tmp_path, monkeypatch):
    words = flags(source, "--format", "mix", "--level", "mix", "--num_records", 270, "--refusals", 0.05)
    assert generate(monkeypatch, *words, "--num_workers", 2, "--output", tmp_path / "two") == 0
    assert digest(tmp_path / "two") == digest(instructions)
    append, calls = Output.append, []

    def killed(self, *what):
        calls.append(what)
        if len(calls) == 100:
            raise Killed
        append(self, *what)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Output, "append", killed)
        generate(patch, *words, "--num_workers", 1, "--output", tmp_path / "cut")
    assert generate(monkeypatch, *words, "--num_workers", 1, "--output", tmp_path / "cut") == 0
    assert digest(tmp_path / "cut") == digest(instructions)


def test_named_prompts_are_what_they_were_without_levels(tmp_path, monkeypatch):
    words = ["--format", "mix", *world(tmp_path, 24), "--num_workers", 1, "--refusals", 0.1]
    assert generate(monkeypatch, *words, "--output", tmp_path / "out") == 0
    found = hashlib.sha256((tmp_path / "out/instructions.jsonl").read_bytes()).hexdigest()
    assert found == "f4290a87dd97f05e8507b8a702a63ca03e587683ce63748b211057a195a1e258"


@pytest.mark.parametrize("level", ["compare", "search"])
def test_what_nobody_answers_otherwise_is_dropped_and_listed(tmp_path, monkeypatch, level):
    """One question of its own, one that all answer alike in other words, and two that are a pair."""
    save_pictures(tmp_path / "images", 6)
    texts = [("Which day is it?", "Monday."), ("Is it nice?", "Yes."), ("is it nice?", "yes"),
             ("Is it nice?", "Yes, it is."), ("How many?", "two"), ("how many?", "3")]  # fmt: skip
    asked = [record(n, conversations=turns(f"<image>\n{q}", a)) for n, (q, a) in enumerate(texts)]
    words = [*write(tmp_path, asked), "--format", "sequence", "--level", level, "--num_images_weights", "2:1"]
    assert generate(monkeypatch, *words, "--output", tmp_path / "out") == 0
    drops = lines(tmp_path / "out/dropped.jsonl")
    assert {drop["id"] for drop in drops} == {f"coco_{number}" for number in range(4)}
    (day,) = (drop["detail"] for drop in drops if drop["id"] == "coco_0")
    assert day.endswith("subset coco gave 1 whose records answer 'Which day is it?' otherwise")
    assert all(drop["reason"] == "no other answer" and not drop["is_bad"] for drop in drops)
    made = lines(tmp_path / "out/instructions.jsonl")
    said = {raw["conversations"][1]["value"] for raw in made}
    assert len(made) == 2 and said <= ({"two and 3", "3 and two"} if level == "compare" else {"1", "2"})


@pytest.mark.parametrize("level", ["compare", "search", "mix"])
def test_a_pip_has_no_levels(tmp_path, monkeypatch, capsys, level):
    words = [*world(tmp_path, 6), "--format", "pip", "--level", level, "--output", tmp_path / "out"]
    assert generate(monkeypatch, *words) == 2
    assert f"--level {level}: a pip has no numbered pictures" in capsys.readouterr().err


def source_of(*turns):
    return Source("x", "x", "x.png", "all", turns, False)


def test_texts_of_short_and_long_answers():
    texts = ("A dog runs fast in a park.", "A cat", "Two men and a boat", "A tree")
    long = [source_of(("What?", text)) for text in texts]
    asked = compared((0, 2), long, "what?")
    assert asked.turn[0] == "In Image1 and Image3, what?"
    assert asked.turn[1] == "Image1: A dog runs fast in a park. Image3: Two men and a boat."
    assert asked.others[0] == "Image1: Two men and a boat. Image3: A dog runs fast in a park."
    assert "Image1: A cat. Image3: A tree." in asked.others and len(asked.others) == 6
    short = [source_of(("What?", text)) for text in ("Dark red.", "Blue", "A very long sentence indeed.", "blue")]
    asked = compared((0, 1), [*short, source_of(("Why?", "x"))], "What?")
    assert (asked.turn[1], asked.others) == ("Dark red and Blue", ["Blue and Dark red"])
    asked = searched(1, 3, ("What colour is it?\nAnswer the question using a single word or phrase.", "Red."))
    assert asked.turn == ('"What colour is it?" For which image is the answer "Red"?', "2")
    assert asked.others == ["1", "3"]


# ---- which answers are right, and rejected


@pytest.mark.parametrize(
    ("text", "is_true"),
    [("red and blue", True), ("Image1: red. Image3: blue.", True), ("The first is red, the other one blue", True),
     ("red", True), ("blue and red", False), ("red and green", False), ("Image 1: blue, Image 3: red", False)],
)  # fmt: skip
def test_an_answer_about_two_is_right_in_their_order(text, is_true):
    """What only doubt speaks for counts as right: it is never rejected."""
    assert is_right(text, "red and blue", in_order=True) == is_true


def asked_at(level, image_type="sequence", number=3):
    for seed in itertools.count():
        prompt, raw = made(question, level, image_type, seed)
        if len(prompt.scenes) == number:
            return parsed(raw)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("Image{}", "right"), ("It is image {}.", "right"), ("1{}", None), ("Image1{}", None), ("red one", "undecided")],
)
def test_a_number_is_right_in_its_forms(text, reason):
    asked = asked_at(SEARCH)
    verdict = judge(Candidate(asked, text.format(asked.answer), "clean"), Rules(THRESHOLDS, max_length_ratio=9))
    assert (verdict and verdict[0]) == reason
    assert numbers_in("the third image, or Images 4 and two") == {"3", "4", "2"} and numbers_in("my image3d") == set()


def test_the_limit_of_attention_on_several_named_together():
    """Of two among three both may have 1 - 0.3 * 0.3; of two among two there is nowhere else to look."""
    def reason(asked, ratio):
        text = "9" if asked.is_search else "wrong and false"
        found = judge(Candidate(asked, text, "clean", True, ratio, 2.0), Rules(THRESHOLDS))
        return found and found[0]

    assert [reason(asked_at(COMPARE), ratio) for ratio in (0.9, 0.92)] == [None, "on target"]
    assert reason(asked_at(COMPARE, number=2), 1.0) is None
    assert [reason(replace(asked_at(SEARCH), answer="2"), ratio) for ratio in (0.69, 0.71)] == [None, "on target"]


def test_what_is_known_of_others_has_no_place_and_is_not_asked_about():
    for level in (COMPARE, SEARCH):
        asked = asked_at(level)
        known = truths(asked, {})
        assert known == [Truth(text, None) for text in asked.extra["others"]]
        assert repointed(asked, known) == [] and truths(replace(asked, extra={}), {}) == []
    compare = asked_at(COMPARE, number=5)
    swapped = " and ".join(reversed(compare.answer.split(" and ")))
    kinds = Counter(other_image(replace(compare, id=str(n)), truths(compare, {}), 0).rejected_from for n in range(200))
    assert 70 < kinds["swapped"] < 130 and kinds["swapped"] + kinds["other_pair"] == 200
    assert other_image(compare, [Truth(swapped, None)], 0).rejected_from == "swapped"
