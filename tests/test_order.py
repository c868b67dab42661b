"""Pictures in another order: the question, its answer and target by the world's truth, training, answering."""

import itertools
import json
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from inference.llava_hound_dpo import measure, run_inference
from inference.llava_hound_dpo.evaluate import evaluate
from llava.order import orders, permutation_of, permuted, why_fixed
from llava.records import DataError, parse_preference, parse_question
from scripts.miniature.make_data import preference, question, save_pictures
from scripts.miniature.prompts import sample_prompt
from tests.conftest import BASE
from tests.test_batches import Ask
from tests.test_trainer import make_trainer, pairs  # noqa: F401  fixtures
from train.llava_hound_dpo.arguments import parse
from train.llava_hound_dpo.batches import RowLoader
from train.llava_hound_dpo.data import longest_orders
from train.llava_hound_dpo.plan import plan
from train.llava_hound_dpo.run_dpo import read_inputs

LABELS = "".join(f"Image{number}:<image>\n" for number in range(1, 4))


def asked(text, answer="red", labels=LABELS, **more):
    """A question about three pictures."""
    raw = {"id": "q", "image": ["a", "b", "c"], "prompt": labels + text, "answer": answer, "target": 2} | more
    return parse_question(raw, "test.json record 1 (id q)")


# ---- the record


@pytest.mark.parametrize("of", [question, preference], ids=["question", "pair"])
def test_a_permuted_record_is_the_same_question_by_the_worlds_truth(of):
    """Against the miniature's own prompt about the same scenes in that order: its words, and what is true there."""
    rng = np.random.default_rng(0)
    for seed in range(200):
        prompt = sample_prompt(rng, "test", "sequence")
        order = tuple(map(int, rng.permutation(len(prompt.scenes))))
        moved = replace(prompt, scenes=tuple(prompt.scenes[n] for n in order), target=order.index(prompt.target))
        raw = {"id": seed, "image": [str(n) for n in range(len(order))]} | of(prompt, rng)
        parsed = (parse_question if of is question else parse_preference)(raw, "x record 1")
        assert why_fixed(parsed) is None
        found = permuted(parsed, order)
        assert (found.prompt, found.target) == (moved.text, moved.target)
        assert found.images == tuple(str(n) for n in order)
        if of is question:
            assert found.answer == moved.answer and sorted(found.extra["others"]) == sorted(moved.others)
        else:
            assert found.chosen == moved.answer and found.rejected == parsed.rejected


def test_numbers_are_rewritten_at_once_and_what_only_looks_like_one_is_left():
    text = "In Image2, is it image 3's or (Image1)? Not images 1, 2 and 3, image3.png, my_image2, Image3D, Image 7, 2."
    before = [{"role": "user", "content": "Is Image1 red?"}, {"role": "assistant", "content": "No, image 2 is."}]
    found = permuted(asked(text, "Image 2 is red", context=before, choices=["Image3", "2", None]), (2, 0, 1))
    assert found.prompt == LABELS + (
        "In Image3, is it image 1's or (Image2)? Not images 2, 3 and 1, image3.png, my_image2, Image3D, Image 7, 2."
    )
    assert found.answer == "Image 3 is red" and found.extra["choices"] == ["Image1", "2", None]
    assert [text for _, text in found.context] == ["Is Image2 red?", "No, image 3 is."]
    assert (found.images, found.target, found.id) == (("c", "a", "b"), 2, "q")


def test_several_targets_and_what_is_looked_for_follow_their_pictures():
    """Of a, b, c in the order c, a, b: what was first is second, what was third is first."""
    found = permuted(asked("In Image1 and Image3, is it red?", "In Image3", target=None), (2, 0, 1))
    assert found.prompt == LABELS + "In Image2 and Image1, is it red?"
    assert (found.targets, found.answer) == ((0, 1), "In Image1")
    again = parse_question({"image": [*found.images], "prompt": found.prompt, "answer": found.answer}, "x record 1")
    assert again.targets == found.targets
    listed = permuted(asked("In Images 1 and 2, is it red?", target=None), (2, 0, 1))
    assert (listed.prompt, listed.targets) == (LABELS + "In Images 2 and 3, is it red?", (1, 2))
    search = {"target": None, "targets": [2, 3], "is_search": True}
    for answer, moved in (("2 and 3", "3 and 1"), ("Image2 and Image3", "Image3 and Image1")):
        found = permuted(asked("Which images show a ring?", answer, **search), (2, 0, 1))
        assert (found.targets, found.answer, found.is_search) == ((0, 2), moved, True)
    assert why_fixed(asked("Which images show a ring?", "the red ones", **search)) == "names no image by its number"


@pytest.mark.parametrize(("answer", "moved"), [("2", "3"), ("Image2.", "Image3."), ("1 and 3", "2 and 1")])
def test_an_answer_to_which_image_is_a_number_of_it(answer, moved):
    assert permuted(asked("Which of the images shows a ring?", answer), (2, 0, 1)).answer == moved
    assert permuted(asked("In Image2, how many rings are there?", answer="2"), (2, 0, 1)).answer == "2"


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (asked("What colour is it?"), "names no image by its number"),
        (asked("Which image is red?", "the dark picture"), "names no image by its number"),
        (asked("Which image is red? A. 1 B. 2", "B"), "names no image by its number"),
        (asked("Which image is red?", "2", choices=["1", "2"]), "numbers its images otherwise"),
        (asked("In Image2, as in the last image?"), "speaks of an order"),
        (asked("In Image2, of images 1 to 3?"), "speaks of an order"),
        (asked("In Image2, as in image 1, 2 and 3?"), "speaks of an order"),
        (asked("In Image2, in the image 3 men stand"), "speaks of an order"),
        (asked("In Image2, what?", "As in the 1st picture"), "speaks of an order"),
        (asked("In Image2, what?", labels=LABELS.replace("Image1", "Image0")), "numbers its images otherwise"),
        (asked("In Image2, what?", labels="<image>\nImage1\n<image>\nImage2\n<image>"), "numbers its images otherwise"),
        (asked("What?", image_type="multi", target=None), "no sequence"),
        (asked("In Image1, what?", image=["a"], labels="<image>\n", target=1, image_type="collage"), "no sequence"),
    ],
)  # fmt: skip
def test_what_would_become_another_question_is_left_with_a_reason(record, why):
    assert why_fixed(record) == why


def test_an_order_that_changes_nothing_gives_the_record_itself():
    record = asked("In Image2, what? Image 3.")
    assert permuted(record, (0, 1, 2)) is record
    for order in itertools.permutations(range(3)):
        back = tuple(order.index(place) for place in range(3))
        assert permuted(permuted(record, order), back) == record


def test_orders_come_each_once_in_the_same_sequence_for_the_same_key():
    assert sorted(orders(3, "a")) == sorted(itertools.permutations(range(3)))
    assert list(orders(4, "a")) == list(orders(4, "a")) != list(orders(4, "b"))
    firsts = [next(orders(3, str(key))) for key in range(600)]
    counts = [firsts.count(order) for order in itertools.permutations(range(3))]
    assert min(counts) > 70, counts  # of 100 expected


# ---- training

PERMUTED = ("--permute_images", "True")


def shown(trainer, epoch, processes=1, **options):
    """What all processes load in an epoch: prompts, target weights and pixels by pair."""
    found = {}
    for rank in range(processes):
        per_process = replace(trainer.batches, world_size=processes, accumulation=9)
        loader = RowLoader(trainer.train_dataset, per_process, rank, collate_fn=lambda items: items, **options)
        loader.set_epoch(epoch)
        for item in itertools.chain.from_iterable(loader):
            if item["step_pairs"]:
                pixels = torch.cat([value.flatten() for value in item["pixels"].values()])
                found[item["index"]] = (
                    item["pair"].prompt,
                    item["pair"].target.tolist(),
                    pixels.double().sum(),
                    pixels,
                )
    return found


def is_same(one, other):
    return one[:2] == other[:2] and torch.equal(one[3], other[3])


class TestTraining:
    def test_every_epoch_shows_sequences_in_another_order_and_the_rest_as_it_is(self, make_trainer):  # noqa: F811
        trainer = make_trainer(*PERMUTED)
        epochs = [shown(trainer, epoch) for epoch in range(3)]
        for index, pair in enumerate(trainer.train_dataset.pairs):
            own = [epoch[index] for epoch in epochs]
            assert torch.stack([total for _, _, total, _ in own]).std() < 1e-3  # the same pictures
            if pair.record.image_type == "sequence":  # the third of two orders is the first again
                assert not is_same(own[0], own[1]) and (len(pair.record.images) == 3 or is_same(own[0], own[2]))
            else:
                plain = trainer.train_dataset[index]
                assert is_same(own[0], own[1]) and own[0][0] == plain["pair"].prompt

    def test_the_target_is_the_same_picture(self, make_trainer):  # noqa: F811
        """Its pixels where the target weights are, in every epoch, are those of the record's Image2."""
        trainer = make_trainer(*PERMUTED)
        pair = trainer.train_dataset.pairs[0]
        wanted = trainer.train_dataset[0]["pixels"]["pixel_values"][1]
        for epoch in range(4):
            item = trainer.train_dataset.item(0, epoch)
            prompt = torch.as_tensor(item["pair"].prompt)
            weights = torch.as_tensor(item["pair"].target)  # of every image token
            place = weights.reshape(len(pair.record.images), -1).sum(dim=1).argmax()
            assert torch.equal(item["pixels"]["pixel_values"][place], wanted)
            assert f"In Image{place + 1}," in trainer.family.tokenizer.decode(prompt)

    def test_processes_and_workers_change_nothing(self, make_trainer):  # noqa: F811
        trainer = make_trainer(*PERMUTED)
        one = shown(trainer, 1)
        for other in (shown(trainer, 1, 3), shown(trainer, 1, 1, num_workers=1, persistent_workers=True)):
            assert one.keys() == other.keys() and all(is_same(one[n], other[n]) for n in one)

    def test_stopped_and_gone_on_with_it_is_the_same_run(self, make_trainer, tmp_path):  # noqa: F811
        flags = (*PERMUTED, "--num_train_epochs", "2", "--per_device_train_batch_size", "2", "--learning_rate", "1e-3")
        whole = make_trainer(*flags, "--output_dir", str(tmp_path / "whole"), "--save_strategy", "no")
        whole.train()
        first = make_trainer(*flags)
        first.add_callback(Ask(6, signal.SIGTERM))
        first.train()
        again = make_trainer(*flags)
        again.train(resume_from_checkpoint=str(tmp_path / f"out/checkpoint-{first.state.global_step}"))
        theirs = dict(whole.model.named_parameters())
        assert first.stop.stopped and all(torch.equal(p, theirs[n]) for n, p in again.model.named_parameters())
        assert again.identity["permute_images"] is True

    def test_rows_have_room_for_the_longest_order(self, make_trainer):  # noqa: F811
        trainer = make_trainer(*PERMUTED, "--num_train_epochs", "2")
        dataset = trainer.train_dataset
        for index, length in enumerate(trainer.batches.lengths):
            rows = [trainer.data_collator([dataset.item(index, e)])["row"].input_ids.numel() for e in range(2)]
            assert length == max(rows)

    def test_a_longer_order_counts_and_one_above_the_limit_is_named(self, make_trainer):  # noqa: F811
        pair = make_trainer().train_dataset.pairs[0]
        orders_of = {0: pair, 1: replace(pair, prompt=[*pair.prompt, 5])}
        found = longest_orders([pair], 2, lambda _, epoch: orders_of[epoch], 4096, lambda own: own.num_tokens)
        assert found == [orders_of[1]]
        with pytest.raises(DataError, match=rf"record 1 \(id 0\): {pair.num_tokens + 1} tokens with 2 images"):
            longest_orders([pair], 2, lambda _, e: orders_of[e], pair.num_tokens, lambda own: own.num_tokens)

    def test_the_plan_says_it(self, pairs, checkpoint):  # noqa: F811
        groups = parse([
            "--model_name_or_path", checkpoint, "--data_path", str(pairs), "--image_folder",
            str(pairs.parent / "images"), "--output_dir", "out", "--dry_run", "True", *PERMUTED,
        ])  # fmt: skip
        text = plan(groups[0], groups[2], groups[3], read_inputs(*groups))
        assert "order          pictures of a pair by seed, id and epoch (another each epoch: 3, no sequence: 6)" in text

    @pytest.mark.parametrize("flags", [("--reference_cache", "cache"), ("--lora_enable", "False")], ids=" ".join)
    def test_stored_reference_log_probs_are_refused_in_one_line(self, make_trainer, flags):  # noqa: F811
        with pytest.raises(ValueError, match=r"^--permute_images: stored reference log-probs are of one order[^\n]*$"):
            make_trainer(*PERMUTED, *flags)
        make_trainer(*PERMUTED, *flags, "--dpo_alpha", "0", "--gamma", "1")

    def test_pairs_without_another_order_are_refused(self, make_trainer, pairs):  # noqa: F811
        kept = [record for record in json.loads(pairs.read_text()) if record["image_type"] != "sequence"]
        pairs.write_text(json.dumps(kept))
        with pytest.raises(ValueError, match=r"^--permute_images: no pair to train on is a sequence"):
            make_trainer(*PERMUTED)


# ---- answering


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Test questions of the miniature with their pictures: six sequences, two collages."""
    folder, rng, records = tmp_path_factory.mktemp("world"), np.random.default_rng(1), []
    for number in range(8):
        prompt = sample_prompt(rng, "test", "sequence" if number < 6 else "collage", 2 + number % 2)
        names = save_pictures(prompt.pictures(), folder / "images", "test", f"q{number}")
        records.append({"id": f"q{number}", "image": names} | question(prompt, rng))
    (folder / "test.json").write_text(json.dumps(records))
    return folder


def answer(world, output, *more, monkeypatch):
    flags = {"model_name_or_path": BASE, "data_path": world / "test.json", "image_folder": world / "images"}
    flags |= {"output": output, "max_new_tokens": 4, "num_workers": 0, "attention_maps": 0}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["run_inference", *words, *map(str, more)])
        run_inference.main()
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_answers_in_other_orders_are_those_to_the_same_questions(world, tmp_path, monkeypatch):
    """The given order as without; each other one under an id of its own, about the same picture; then scored."""
    plain = answer(world, tmp_path / "plain.jsonl", monkeypatch=monkeypatch)
    found = answer(world, tmp_path / "answers.jsonl", "--permutations", 3, monkeypatch=monkeypatch)
    records = {record["id"]: record for record in json.loads((world / "test.json").read_text())}
    assert [(a["question_id"], a["text"]) for a in found[:8]] == [(a["question_id"], a["text"]) for a in plain]
    more = found[8:]
    assert len(more) == 3 * 1 + 3 * 2 and len({a["question_id"] for a in found}) == len(
        found
    )  # two pictures: one other
    for given in more:
        of, order = permutation_of(given, given["num_images"])
        assert given["question_id"].startswith(f"{of}#") and list(order) != sorted(order)
        assert order[given["target"] - 1] == records[of]["target"] - 1 and given["answer"] == records[of]["answer"]
        assert f"In Image{given['target']}," in given["prompt"]
    flags = ["--model_name_or_path", BASE, "--data_path", world / "test.json", "--image_folder", world / "images",
             "--answers", tmp_path / "answers.jsonl", "--output", tmp_path / "measured.jsonl", "--num_workers", "0",
             "--attention_maps", "0", "--permutations", "3"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["measure", *map(str, flags)])
    measure.main()
    measured = [json.loads(line) for line in (tmp_path / "measured.jsonl").read_text().splitlines()]
    for one, other in zip(found, measured, strict=True):
        assert (one["question_id"], one["prompt"], one["target"]) == tuple(
            other[n] for n in ("question_id", "prompt", "target")
        )
        assert one["attention_ratio"] == pytest.approx(other["attention_ratio"], abs=1e-4)
    scores, rows = evaluate([tmp_path / "answers.jsonl"], world / "test.json")
    assert scores["answers"]["answers"]["order"]["questions"] == 6 and len(rows["answers"]) == 8


def test_a_killed_run_goes_on_with_the_same_orders(world, tmp_path, monkeypatch):
    whole = answer(world, tmp_path / "whole.jsonl", "--permutations", 2, "--batch_size", 2, monkeypatch=monkeypatch)
    calls, real = [], run_inference.answer.__globals__["generate"]

    def killed(*arguments, **settings):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setitem(run_inference.answer.__globals__, "generate", killed)
        with pytest.raises(KeyboardInterrupt):
            answer(world, tmp_path / "cut.jsonl", "--permutations", 2, "--batch_size", 2, monkeypatch=monkeypatch)
    assert (tmp_path / "cut.jsonl.parts").is_dir()
    again = answer(world, tmp_path / "cut.jsonl", "--permutations", 2, "--batch_size", 2, monkeypatch=monkeypatch)
    assert again == whole


def test_questions_without_another_order_are_refused(world, tmp_path, monkeypatch, capsys):
    collages = [r for r in json.loads((world / "test.json").read_text()) if r["image_type"] == "collage"]
    path = tmp_path / "collages.json"
    path.write_text(json.dumps(collages))
    with pytest.raises(SystemExit) as caught:
        answer(world, tmp_path / "a.jsonl", "--data_path", path, "--permutations", 2, monkeypatch=monkeypatch)
    said = capsys.readouterr()
    assert caught.value.code == 2 and "--permutations 2: no question is a sequence" in said.err + said.out
