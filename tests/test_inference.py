"""Answers of a whole test set: batch size, number of processes and kills change nothing; bad input is named."""

import errno
import json
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from inference.llava_hound_dpo import run_inference
from llava.answers import AnswerStore
from llava.checkpoints import open_checkpoint
from llava.families import Llava15
from llava.image import ImageStore
from llava.records import read_questions
from llava.regions import part_weights, target_weights
from tests import forks
from tests.conftest import kill_with_workers, make_world, shared

ROOT = Path(__file__).parent.parent
BASE = ROOT / "scripts/miniature/base"
LAYER = 2  # what `auto` is for the miniature's four layers


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return shared(tmp_path_factory, "questions", write_world)


def write_world(folder):
    make_world(folder, "--num_test", 200)
    (folder / "small.json").write_text(json.dumps(json.loads((folder / "test.json").read_text())[:60]))


def words(world, output, *more):
    flags = {"model_name_or_path": BASE, "data_path": world / "small.json", "image_folder": world / "images"}
    flags |= {"output": output, "max_new_tokens": 6, "num_workers": 0, "attention_maps": 4}
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)] + [str(w) for w in more]


@pytest.fixture
def answer(world, tmp_path, monkeypatch):
    """Runs inference in this process and gives the answers."""

    def run(name, *more):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["run_inference", *words(world, tmp_path / name, *more)])
            run_inference.main()
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]

    return run


class TestNumbers:
    """200 prompts of all formats mixed."""

    @pytest.fixture(scope="class")
    def batched(self, world, tmp_path_factory):
        """Answers by batch size, and without a probe ("none")."""
        runs = {"1": ["--batch_size", "1"], "4": ["--batch_size", "4"], "16": ["--batch_size", "16"]}
        runs["none"] = ["--batch_size", "16", "--attention_layers", "none"]

        def make(folder):
            for name, flags in runs.items():
                command = words(world, folder / f"{name}.jsonl", "--data_path", world / "test.json", *flags)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(sys, "argv", ["run_inference", *command])
                    run_inference.main()

        folder = shared(tmp_path_factory, "batched", make)
        return {
            name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()] for name in runs
        }

    @pytest.mark.parametrize("size", ["4", "16"])
    def test_batched_equals_one_by_one(self, batched, world, size):
        asked = [record["id"] for record in json.loads((world / "test.json").read_text())]
        assert [a["question_id"] for a in batched["1"]] == [a["question_id"] for a in batched[size]] == asked
        for a, b in zip(batched["1"], batched[size], strict=True):
            assert (a["text"], a["num_tokens"]) == (b["text"], b["num_tokens"])
            assert a["attention_ratio"] == pytest.approx(b["attention_ratio"], abs=1e-5)
            assert a["confidence"] == pytest.approx(b["confidence"], abs=1e-5)

    def test_the_probe_changes_no_token(self, batched):
        for a, b in zip(batched["16"], batched["none"], strict=True):
            assert (a["text"], a["num_tokens"], a["confidence"]) == (b["text"], b["num_tokens"], b["confidence"])
            assert a["attention_ratio"] is not None and b["attention_ratio"] is None

    def test_ratios_and_shares_equal_those_of_eager_attention(self, batched, world):
        """Every fifth prompt, alone, prompt and answer in one forward through transformers' eager attention."""
        checkpoint = open_checkpoint(str(BASE))
        model, family = checkpoint.load(), checkpoint.family
        model.set_attn_implementation({"text_config": "eager"})
        processor, store = family.processor(), ImageStore(world / "images")
        questions = read_questions(world / "test.json")
        for question, given in list(zip(questions, batched["16"], strict=True))[::5]:
            pictures = [store.open(name) for name in question.images]
            text = family.render([(question.prompt, given["text"])])
            ids = processor(text=text, images=pictures, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                maps = model(input_ids=ids, **family.pixels(pictures), output_attentions=True).attentions[LAYER]
            rows = maps[0, :, -1 - given["num_tokens"] : -1].mean(dim=(0, 1))  # those that predict the answer
            on_images = rows[ids[0] == model.config.image_token_id]
            images = [family.image(picture.size) for picture in pictures]
            ratio = (on_images * target_weights(question, images)).sum() / on_images.sum()
            assert given["attention_ratio"] == pytest.approx(ratio.item(), abs=1e-5), question.where
            shares = part_weights(question, images) @ on_images / on_images.sum()
            assert given["attention_by_image"] == pytest.approx(shares.tolist(), abs=1e-5), question.where
            assert given["attention_by_image"][given["target"] - 1] == pytest.approx(ratio.item(), abs=1e-5)

    def test_maps_are_kept_for_questions_of_every_format(self, batched):
        kept = [a for a in batched["16"] if "attention_map" in a]
        assert {a["image_type"] for a in kept} == {"sequence", "collage", "pip", "single"} and len(kept) == 4
        for a in kept:
            total = [sum(map(sum, image["mass"])) for image in a["attention_map"]]
            if a["image_type"] == "sequence":
                assert [t / sum(total) for t in total] == pytest.approx(a["attention_by_image"], abs=5e-3)


def test_earlier_turns_are_part_of_the_prompt_and_of_the_answer(answer, world, tmp_path):
    """The answer is what plain `generate` gives to the rendered conversation."""
    record = json.loads((world / "small.json").read_text())[0] | {
        "context": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"},
                    {"role": "assistant", "content": "Hello."}],
    }  # fmt: skip
    (tmp_path / "turns.json").write_text(json.dumps([record]))
    (given,) = answer("turns.jsonl", "--data_path", tmp_path / "turns.json")
    assert given["context"] == record["context"]
    checkpoint = open_checkpoint(str(BASE))
    model, family = checkpoint.load(), checkpoint.family
    pictures = [ImageStore(world / "images").open(name) for name in record["image"]]
    text = family.render([("Hello?", "Hello."), (record["prompt"], None)], system="Be brief.")
    inputs = family.processor()(text=text, images=pictures, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert given["text"] == family.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_sampling_repeats_with_its_seed_and_differs_without(answer):
    flags = ("--temperature", 2.0, "--top_p", 0.95, "--batch_size", 16)
    first, again = answer("a.jsonl", *flags), answer("b.jsonl", *flags)
    other = answer("c.jsonl", *flags, "--seed", 1)
    assert first == again
    assert [a["text"] for a in first] != [a["text"] for a in other]


def test_answers_that_the_limit_cut_off_are_marked_counted_and_said(answer, tmp_path, capsys):
    assert all(a["is_complete"] for a in answer("whole.jsonl")) and "cut off" not in capsys.readouterr().out
    flags = ("--temperature", 2.0, "--top_p", 0.95)  # answers of different length, their first tokens the same
    longer, limited = answer("longer.jsonl", *flags), answer("limited.jsonl", *flags, "--max_new_tokens", 2)
    assert [a["is_complete"] for a in limited] == [a["num_tokens"] <= 2 for a in longer]
    count = sum(not a["is_complete"] for a in limited)
    assert 0 < count < 60
    assert f"{count} of them did not end and were cut off at --max_new_tokens 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "limited.run.json").read_text())["counts"] == {
        "answers": 60,
        "cut_off": count,
        "too_long": 0,
    }


def test_unknown_fields_of_the_test_set_are_passed_on(answer, world, tmp_path):
    records = json.loads((world / "small.json").read_text())[:3]
    for record in records:
        record |= {"source_index": 7, "text": "a field of ours stays ours"}
    (tmp_path / "more.json").write_text(json.dumps(records))
    answers = answer("more.jsonl", "--data_path", tmp_path / "more.json")
    assert all(a["source_index"] == 7 and a["text"] != records[0]["text"] for a in answers)
    assert [a["others"] for a in answers if "others" in a] == [r["others"] for r in records if "others" in r]


def launch(world, output, processes, *more):
    command = ["torchrun", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    command += ["-m", "inference.llava_hound_dpo.run_inference", *words(world, output, *more)]
    log = output.with_name(f"{output.name}.log")
    return forks.Job(command, cwd=ROOT, new_session=True, stdout=log, stderr=log), log


def test_two_processes_give_the_same_file_as_one(answer, world, tmp_path):
    answer("one.jsonl")
    job, log = launch(world, tmp_path / "two.jsonl", 2)
    assert job.wait(timeout=120) == 0, log.read_text()
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def size_of(parts):
    return sum(part.stat().st_size for part in parts.glob("*.jsonl"))


class TestKilled:
    """What a kill can leave behind, and real kills."""

    def test_any_prefix_of_the_answers_written_so_far_is_continued_to_the_same_file(
        self, answer, world, tmp_path, monkeypatch
    ):
        answer("whole.jsonl")
        with monkeypatch.context() as patch, pytest.raises(FileNotFoundError):
            patch.setattr(AnswerStore, "finish", lambda store, ids: {"answers": 0, "cut_off": 0, "too_long": 0})
            answer("cut.jsonl")  # everything answered, not merged
        parts = tmp_path / "cut.jsonl.parts"
        part, marker = parts / "0.jsonl", (parts / "run.json").read_bytes()
        whole, chance = part.read_bytes(), random.Random(0)
        for _ in range(10):
            (tmp_path / "cut.jsonl").unlink(missing_ok=True)
            parts.mkdir(exist_ok=True)
            (parts / "run.json").write_bytes(marker)
            part.write_bytes(whole[: chance.randrange(len(whole))])
            answer("cut.jsonl")
            assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    def killed(self, world, output, after):
        """Start a run of two processes and kill both at some moment after a new answer."""
        job, _ = launch(world, output, 2, *self.flags(world))
        parts, deadline = output.with_name(output.name + ".parts"), time.monotonic() + 60
        before = size_of(parts)
        while size_of(parts) == before and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(after)
        assert job.poll() is None, "the run was over before it was killed"
        kill_with_workers(job)

    def flags(self, world):
        return "--data_path", world / "test.json", "--batch_size", 1

    @pytest.mark.slow  # one process killed at any moment: tests/test_kills.py
    @pytest.mark.parametrize("times", [2, 10], ids=["two", "ten"])
    def test_real_kills_at_random_moments(self, answer, world, tmp_path, times):
        whole = answer("whole.jsonl", *self.flags(world))
        output, chance = tmp_path / "killed.jsonl", random.Random(times)
        for _ in range(times):
            self.killed(world, output, chance.uniform(0, 1 / times))
            assert not output.exists()
        job, log = launch(world, output, 2, *self.flags(world))
        assert job.wait(timeout=120) == 0, log.read_text()
        assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert len({a["question_id"] for a in whole}) == len(whole) == 200
        assert not output.with_name("killed.jsonl.parts").exists()

    @pytest.mark.parametrize("step", ["before the answers file", "before the parts go", "between the parts"])
    def test_an_interrupted_merge_is_finished_by_the_next_start(self, answer, tmp_path, monkeypatch, step):
        answer("whole.jsonl")
        with monkeypatch.context() as patch:
            unlink, count = Path.unlink, iter(range(100))
            if step == "before the answers file":
                patch.setattr("llava.answers.write_run_json", stopped)
            elif step == "before the parts go":
                patch.setattr(Path, "unlink", stopped)
            else:
                patch.setattr(Path, "unlink", lambda path: stopped() if next(count) else unlink(path))
            with pytest.raises(KeyboardInterrupt):
                answer("cut.jsonl")
        answer("cut.jsonl")
        assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert not (tmp_path / "cut.jsonl.parts").exists() and (tmp_path / "cut.run.json").is_file()


def stopped(*args, **kwargs):
    raise KeyboardInterrupt


class TestRefused:
    def code(self, answer, capsys, *more):
        with pytest.raises(SystemExit) as ended:
            answer("refused.jsonl", *more)
        return ended.value.code, capsys.readouterr().err

    def changed(self, world, tmp_path, change):
        records = json.loads((world / "small.json").read_text())
        change(records)
        (tmp_path / "bad.json").write_text(json.dumps(records))
        return "--data_path", tmp_path / "bad.json"

    def test_a_missing_picture(self, answer, capsys, world, tmp_path):
        flags = self.changed(world, tmp_path, lambda records: records[4]["image"].__setitem__(0, "no.png"))
        code, error = self.code(answer, capsys, *flags)
        assert code == 2 and "record 5" in error and "no.png: no such picture" in error and error.count("\n") == 1

    def test_a_truncated_picture(self, answer, capsys, world, tmp_path):
        name = json.loads((world / "small.json").read_text())[4]["image"][0]
        (tmp_path / "cut.png").write_bytes((world / "images" / name).read_bytes()[:200])
        records = [{"id": "x", "image": ["cut.png"], "prompt": "<image>\nWhat?", "answer": "y", "image_type": "single"}]
        (tmp_path / "bad.json").write_text(json.dumps(records))
        code, error = self.code(answer, capsys, "--data_path", tmp_path / "bad.json", "--image_folder", tmp_path)
        assert code == 2 and "record 1 (id x)" in error and "truncated or damaged" in error

    def test_a_target_outside_its_picture(self, answer, capsys, world, tmp_path):
        flags = self.changed(world, tmp_path, lambda records: records[1].update(target_box=[0, 0, 500, 20]))
        code, error = self.code(answer, capsys, *flags)
        assert code == 2 and "record 2" in error and "outside" in error

    def test_an_id_used_twice(self, answer, capsys, world, tmp_path):
        flags = self.changed(world, tmp_path, lambda records: records[1].update(id=records[0]["id"]))
        code, error = self.code(answer, capsys, *flags)
        assert code == 2 and "was there before" in error

    @pytest.mark.parametrize(("text", "said"), [("", "empty"), ("[{", "broken JSON"), ("[]", "no record")], ids=repr)
    def test_an_unreadable_test_set(self, answer, capsys, tmp_path, text, said):
        (tmp_path / "bad.json").write_text(text)
        code, error = self.code(answer, capsys, "--data_path", tmp_path / "bad.json")
        assert code == 2 and said in error and "bad.json" in error

    @pytest.mark.parametrize("flags", [("--temperature", -1), ("--top_p", 0), ("--num_beams", 2, "--temperature", 1)])
    def test_settings_that_make_no_sense(self, answer, capsys, flags):
        code, error = self.code(answer, capsys, *flags)
        assert code == 2 and error.count("\n") == 1

    def test_unfinished_answers_of_another_run(self, answer, capsys, tmp_path):
        parts = tmp_path / "refused.jsonl.parts"
        parts.mkdir()
        (parts / "run.json").write_text('{"arguments": {"seed": "9"}}')
        code, error = self.code(answer, capsys)
        assert code == 2 and "another run" in error and "seed" in error and parts.exists()

    def test_finished_answers_of_another_run_are_not_overwritten(self, answer, capsys, tmp_path):
        answer("refused.jsonl")
        before = (tmp_path / "refused.jsonl").read_bytes()
        answer("refused.jsonl")  # the same run again: nothing to do
        assert "nothing to do" in capsys.readouterr().out
        code, error = self.code(answer, capsys, "--max_new_tokens", 3)
        assert code == 2 and "max_new_tokens" in error
        assert (tmp_path / "refused.jsonl").read_bytes() == before

    def test_a_second_run_at_once_is_refused_and_the_first_goes_on(self, answer, capsys, tmp_path, monkeypatch):
        answer("whole.jsonl")
        append, refused = AnswerStore.append, []
        monkeypatch.setattr("llava.run_folder.PATIENCE_S", 0.1)

        def another(store, part, records):
            monkeypatch.setattr(AnswerStore, "append", append)
            refused.append(self.code(answer, capsys))
            append(store, part, records)

        monkeypatch.setattr(AnswerStore, "append", another)
        answer("refused.jsonl")
        ((code, error),) = refused
        assert code == 2 and error.count("error:") == 1 and "another process is writing there" in error.splitlines()[-1]
        assert (tmp_path / "refused.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    def test_a_file_of_somebody_else_is_not_overwritten(self, answer, capsys, tmp_path):
        (tmp_path / "refused.jsonl").write_text("mine\n")
        code, error = self.code(answer, capsys)
        assert code == 2 and "refused.run.json" in error
        assert (tmp_path / "refused.jsonl").read_text() == "mine\n"

    def test_weights_that_do_not_load_are_named_as_such(self, answer, capsys, tmp_path):
        broken = shutil.copytree(BASE, tmp_path / "broken")
        (broken / "model.safetensors").write_bytes((BASE / "model.safetensors").read_bytes()[:1000])
        code, error = self.code(answer, capsys, "--model_name_or_path", broken)
        line = error.strip().splitlines()[-1]
        assert code == 2 and "cannot be read as tensors" in line and "cannot be written" not in error

    def test_a_full_disk_loses_nothing(self, answer, capsys, tmp_path, monkeypatch):
        """The disk is full at the third batch, in the middle of a line."""
        answer("whole.jsonl")
        append, batches = AnswerStore.append, []

        def full(store, part, records):
            batches.append(records)
            if len(batches) == 3:
                with (store.parts / f"{part}.jsonl").open("a") as file:
                    file.write(json.dumps(records[0])[:40])
                raise OSError(errno.ENOSPC, "No space left on device")
            append(store, part, records)

        with monkeypatch.context() as patch:
            patch.setattr(AnswerStore, "append", full)
            code, error = self.code(answer, capsys)
        assert code == 2 and "No space left on device" in error and "start the same command again" in error
        answer("refused.jsonl")
        assert (tmp_path / "refused.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_only_base_model_answers_with_the_base_below_an_adapter(answer, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=Llava15.lora_targets(), init_lora_weights=False)
    model = get_peft_model(open_checkpoint(str(BASE)).load(), config)
    model.peft_config["default"].base_model_name_or_path = str(BASE)
    model.save_pretrained(tmp_path / "adapter")
    base, adapter = answer("base.jsonl"), answer("adapter.jsonl", "--model_name_or_path", tmp_path / "adapter")
    below = answer("below.jsonl", "--model_name_or_path", tmp_path / "adapter", "--only_base_model")
    assert below == base != adapter
