"""Answers of a whole test set: batch size, number of processes and kills change nothing; bad input is named."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from inference.llava_hound_dpo import run_inference
from llava.answers import AnswerStore

ROOT = Path(__file__).parent.parent
BASE = ROOT / "scripts/miniature/base"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    command = [sys.executable, "-m", "scripts.miniature.make_data", "--output", str(folder), "--num_train", "3"]
    subprocess.run([*command, "--num_test", "60", "--seed", "3"], cwd=ROOT, check=True, capture_output=True)
    return folder


def words(world, output, *more):
    flags = {"model_name_or_path": BASE, "data_path": world / "test.json", "image_folder": world / "images"}
    flags |= {"output": output, "max_new_tokens": 6, "num_workers": 0}
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)] + [str(w) for w in more]


@pytest.fixture
def answer(world, tmp_path, monkeypatch):
    """Runs inference in this process; gives the answers, if they are finished."""

    def run(name, *more):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["run_inference", *words(world, tmp_path / name, *more)])
            run_inference.main()
        return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] if (tmp_path / name).exists() else None

    return run


def test_batched_equals_one_by_one(answer, world):
    single, eight = answer("one.jsonl", "--batch_size", 1), answer("eight.jsonl", "--batch_size", 16)
    asked = [record["id"] for record in json.loads((world / "test.json").read_text())]
    assert [a["question_id"] for a in single] == [a["question_id"] for a in eight] == asked
    for a, b in zip(single, eight, strict=True):
        assert (a["text"], a["num_tokens"]) == (b["text"], b["num_tokens"])
        assert a["attention_ratio"] == pytest.approx(b["attention_ratio"], abs=1e-5)
        assert a["confidence"] == pytest.approx(b["confidence"], abs=1e-5)


def test_sampling_repeats_with_its_seed_and_differs_without(answer):
    flags = ("--temperature", 2.0, "--top_p", 0.95, "--batch_size", 16)
    first, again = answer("a.jsonl", *flags), answer("b.jsonl", *flags)
    other = answer("c.jsonl", *flags, "--seed", 1)
    assert first == again
    assert [a["text"] for a in first] != [a["text"] for a in other]


def launch(world, output, processes):
    command = ["torchrun", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    command += ["-m", "inference.llava_hound_dpo.run_inference", *words(world, output)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PATH": path}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_give_the_same_file_as_one(answer, world, tmp_path):
    answer("one.jsonl")
    job = launch(world, tmp_path / "two" / "answers.jsonl", 2)
    _, errors = job.communicate(timeout=120)
    assert job.returncode == 0, errors
    assert (tmp_path / "two" / "answers.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


class TestKilled:
    """What a kill can leave behind, and a real kill."""

    def test_any_prefix_of_the_answers_written_so_far_is_continued_to_the_same_file(
        self, answer, world, tmp_path, monkeypatch
    ):
        answer("whole.jsonl")
        kept = {}
        monkeypatch.setattr(AnswerStore, "finish", lambda store, ids: kept.update(at=store.parts))
        answer("cut.jsonl")  # everything answered, not merged
        monkeypatch.undo()
        part, marker = kept["at"] / "0.jsonl", (kept["at"] / "run.json").read_bytes()
        whole = part.read_bytes()
        chance = random.Random(0)
        for _ in range(10):
            (tmp_path / "cut.jsonl").unlink(missing_ok=True)
            kept["at"].mkdir(exist_ok=True)
            (kept["at"] / "run.json").write_bytes(marker)
            part.write_bytes(whole[: chance.randrange(len(whole))])
            answer("cut.jsonl")
            assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()

    def test_a_real_kill(self, answer, world, tmp_path):
        answer("whole.jsonl")
        output = tmp_path / "killed.jsonl"
        job = launch(world, output, 1)
        part = tmp_path / "killed.jsonl.parts" / "0.jsonl"
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        assert not output.exists()
        answer("killed.jsonl")
        assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


class TestRefused:
    def code(self, answer, capsys, *more):
        with pytest.raises(SystemExit) as ended:
            answer("refused.jsonl", *more)
        return ended.value.code, capsys.readouterr().err

    def test_a_missing_picture(self, answer, capsys, world, tmp_path):
        records = json.loads((world / "test.json").read_text())
        records[4]["image"][0] = "no.png"
        (tmp_path / "bad.json").write_text(json.dumps(records))
        code, error = self.code(answer, capsys, "--data_path", tmp_path / "bad.json")
        assert code == 2 and "record 5" in error and "no.png: no such picture" in error

    def test_an_id_used_twice(self, answer, capsys, world, tmp_path):
        records = json.loads((world / "test.json").read_text())
        records[1]["id"] = records[0]["id"]
        (tmp_path / "bad.json").write_text(json.dumps(records))
        code, error = self.code(answer, capsys, "--data_path", tmp_path / "bad.json")
        assert code == 2 and "was there before" in error

    def test_unfinished_answers_of_another_run(self, answer, capsys, tmp_path):
        parts = tmp_path / "refused.jsonl.parts"
        parts.mkdir()
        (parts / "run.json").write_text('{"arguments": {"seed": "9"}}')
        code, error = self.code(answer, capsys)
        assert code == 2 and "another run" in error and parts.exists()


def test_only_base_model_answers_with_the_base_below_an_adapter(answer, tmp_path):
    from peft import LoraConfig, get_peft_model

    from llava.checkpoints import LORA_TARGETS, load_model

    model = get_peft_model(load_model(str(BASE)), LoraConfig(r=2, target_modules=LORA_TARGETS, init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(BASE)
    model.save_pretrained(tmp_path / "adapter")
    base, adapter = answer("base.jsonl"), answer("adapter.jsonl", "--model_name_or_path", tmp_path / "adapter")
    below = answer("below.jsonl", "--model_name_or_path", tmp_path / "adapter", "--only_base_model")
    assert below == base != adapter
