"""Whole runs that make preference pairs: right numbers, and the same pairs however they are computed."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_gen.gen_chosen_rejected import __main__ as gen_chosen_rejected
from data_gen.gen_chosen_rejected.others import bare_question
from data_gen.gen_instruction import __main__ as gen_instruction
from llava.checkpoints import Checkpoint, open_checkpoint
from llava.command_line import parse
from llava.image import ImageStore
from llava.records import read_instructions, read_preferences
from scripts.miniature import make_source
from tests import forks
from tests.conftest import kill_with_workers
from tests.single_images import generate
from tests.test_elsewhere import key_of, said_to, server  # noqa: F401  a fixture
from train.llava_hound_dpo import run_dpo

ROOT = Path(__file__).parent.parent
BASE = ROOT / "scripts/miniature/base"
SCRIPT = ROOT / "data_gen/gen_chosen_rejected/gen_chosen_rejected.sh"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Instructions of the three formats from the miniature's pictures."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_source", "--output", str(folder), "--num_pictures", "60"])
        make_source.main()
        flags = ("--source", folder / "source.json", "--image_folder", folder / "images", "--output", folder / "made")
        mixed = ("--format", "mix", "--shares", "sequence:70,collage:15,pip:15", "--num_cells_weights", "2:1,4:1")
        assert generate(patch, *flags, *mixed, "--num_records", 90, "--num_workers", 1, "--refusals", 0.05,
                        module=gen_instruction) == 0  # fmt: skip
    return folder


def flags(world, output, *more):
    given = {"model_name_or_path": BASE, "instructions": world / "made/instructions.jsonl", "output": output}
    given |= {"image_folder": world / "made/images", "max_new_tokens": 6, "num_workers": 0, "attention_layers": 3}
    given["batch_size"] = 1  # so that a run lasts long enough to be killed
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    return [str(word) for word in (*words, "--source", world / "source.json", *more)]


@pytest.fixture
def make(world, tmp_path, monkeypatch):
    """Runs the stage in this process; its pairs."""

    def run(name, *more):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["gen_chosen_rejected", *flags(world, tmp_path / name, *more)])
            gen_chosen_rejected.main()
        return json.loads((tmp_path / name / "pairs.json").read_text())

    return run


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gen_chosen_rejected", *flags(world, folder / "pairs")])
        gen_chosen_rejected.main()
    return folder / "pairs"


def known_answers(world):
    """Question in small letters: answer, by path of the source picture."""
    records = json.loads((world / "source.json").read_text())
    texts = {record["image"]: [turn["value"] for turn in record["conversations"]] for record in records}
    return {
        path: {q.removeprefix("<image>\n").lower(): a for q, a in zip(t[::2], t[1::2], strict=True)}
        for path, t in texts.items()
    }


def test_rejected_answers_are_wrong_and_often_true_of_another_image(world, made, record_property):
    known, pairs = known_answers(world), json.loads((made / "pairs.json").read_text())
    wrong = others = 0
    for pair in pairs:
        truth = [known[source["path"]][bare_question(pair["prompt"])] for source in pair["sources"]]
        assert pair["chosen"] == pair["gt"] == truth[pair["target"] - 1]
        wrong += pair["rejected"] != pair["chosen"]
        is_true = pair["rejected"] in truth[: pair["target"] - 1] + truth[pair["target"] :]
        assert pair["true_of_another"] == is_true
        others += is_true
    record_property("true of another image", f"{others} of {len(pairs)}")
    assert len(pairs) >= 10 and wrong >= 0.99 * len(pairs) and others >= 0.2 * len(pairs)


def test_everything_is_counted_once(world, made):
    counts = json.loads((made / "run.json").read_text())["counts"]
    dropped = [json.loads(line) for line in (made / "dropped.jsonl").read_text().splitlines()]
    ids = [line["id"] for line in dropped] + [pair["id"] for pair in json.loads((made / "pairs.json").read_text())]
    asked = [question.id for question in read_instructions(world / "made/instructions.jsonl")]
    assert sorted(ids) == sorted(asked) and counts["candidates"] == len(asked) == 90
    assert counts["kept"] + sum(counts["dropped"].values()) == 90 and counts["dropped"]["refusal"] >= 1
    assert sum(sum(row.values()) for row in counts["by_format"].values()) == 90
    assert "| all |  | 90 |" in (made / "summary.md").read_text()


def test_numbers_are_those_of_a_plain_forward(world, made):
    """Perplexity of the model's own greedy answer, from one forward over prompt and answer."""
    checkpoint = open_checkpoint(str(BASE))
    model, family = checkpoint.load(), checkpoint.family
    processor, store = family.processor(), ImageStore(world / "made/images")
    answers = [json.loads(line) for line in (made / "answers.jsonl").read_text().splitlines()]
    questions = {question.id: question for question in read_instructions(world / "made/instructions.jsonl")}
    for given in answers[::8]:
        pictures = [store.open(name) for name in questions[given["question_id"]].images]
        text = family.render([(given["prompt"], given["text"])])
        ids = processor(text=text, images=pictures, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids, **family.pixels(pictures)).logits[0, -1 - given["num_tokens"] : -1]
        largest = logits.double().log_softmax(-1).amax(-1)
        assert given["perplexity"] == pytest.approx(math.exp(-largest.mean().item()), rel=1e-4)
        assert given["confidence"] == pytest.approx(largest[0].exp().item(), rel=1e-4)


def test_batched_equals_one_by_one(make, made):
    alone, batched = json.loads((made / "pairs.json").read_text()), make("batched", "--batch_size", 8)
    assert [(p["id"], p["chosen"], p["rejected"]) for p in alone] == [
        (p["id"], p["chosen"], p["rejected"]) for p in batched
    ]
    for a, b in zip(alone, batched, strict=True):
        assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-4)
        assert a["attention_ratio"] == pytest.approx(b["attention_ratio"], abs=1e-5)


def test_pairs_are_records_that_train(world, made, tmp_path, monkeypatch, capsys):
    pairs = read_preferences(made / "pairs.json")
    assert {pair.image_type for pair in pairs} == {"sequence", "collage", "pip"}
    assert all(pair.extra["rejected_from"] == "clean" and pair.extra["sources"] for pair in pairs)
    assert all("conversations" not in pair.extra and "is_refusal" not in pair.extra for pair in pairs)
    words = {"model_name_or_path": BASE, "data_path": made / "pairs.json", "image_folder": world / "made/images"}
    words |= {"output_dir": tmp_path / "trained", "dry_run": True, "report_to": "none", "bf16": False, "use_cpu": True}
    monkeypatch.setattr(sys, "argv", ["run_dpo", *(str(w) for n, v in words.items() for w in (f"--{n}", v))])
    run_dpo.main()
    assert f"{len(pairs)} to train on" in capsys.readouterr().out


def answered(made, folder):
    """A folder with the answers of a finished run, as if it had been killed before it selected."""
    folder.mkdir()
    for name in ("answers.jsonl", "answers.run.json"):
        (folder / name).write_bytes((made / name).read_bytes())


def test_other_rules_need_no_model(make, made, tmp_path, monkeypatch):
    answered(made, tmp_path / "again")
    monkeypatch.setattr(Checkpoint, "load", None)  # a call would fail
    strict = make("again", "--thresholds", '{"sequence": {"2": 0.0, "3": 0.0, "4": 0.0, "5": 0.0}}')
    before = json.loads((made / "pairs.json").read_text())
    assert strict == [pair for pair in before if pair["image_type"] != "sequence"] != before
    assert make("again") == before


def test_noisy_pictures_are_for_the_model_only(make, made, tmp_path):
    pairs = make("noisy", "--degrade", "published")
    stds = {"sequence": "clean", "collage": "noise_target_225", "pip": "noise_whole_49"}
    assert pairs and all(pair["rejected_from"] == stds[pair["image_type"]] for pair in pairs)
    clean, noisy = (
        {a["question_id"]: a for a in map(json.loads, (folder / "answers.jsonl").open())}
        for folder in (made, tmp_path / "noisy")
    )
    assert {clean[id]["image_type"] for id in clean if clean[id] != noisy[id]} == {"collage", "pip"}
    assert all(clean[id] != noisy[id] for id in clean if clean[id]["image_type"] != "sequence")


def test_a_server_answers_and_the_model_measures(make, world, made, tmp_path, server):  # noqa: F811
    """The same pairs as of the model's own answers, also if the server went away on the way; noise is shown to it."""
    lines = [json.loads(line) for line in (made / "answers.jsonl").read_text().splitlines()]
    images = {question.id: question.images for question in read_instructions(world / "made/instructions.jsonl")}
    answers = said_to(world / "made/images", [images[line["question_id"]] for line in lines], lines)
    more = ("--endpoint", server.url, "--batch_size", 1)
    server.answers = dict(list(answers.items())[:-2])
    with pytest.raises(SystemExit):
        make("served", *more)
    assert not (tmp_path / "served/answers.jsonl").exists()
    server.answers, server.requests = answers, []
    pairs, wanted = make("served", *more), json.loads((made / "pairs.json").read_text())
    assert len(server.requests) == 2
    for pair, other in zip(pairs, wanted, strict=True):
        for name in ("attention_ratio", "perplexity"):
            assert pair.pop(name) == pytest.approx(other.pop(name), abs=1e-5)
    assert pairs == wanted
    make("served", *more, "--min_perplexity", 1.5)  # selects again without the server
    assert len(server.requests) == 2
    with pytest.raises(SystemExit):
        make("served")  # not the model's own
    server.answers = {}
    with pytest.raises(SystemExit):
        make("noisy", *more, "--degrade", "whole")
    assert key_of(server.requests[-1])[0] in {key[0] for key in answers} and key_of(server.requests[-1]) not in answers


def test_pairs_without_a_model(make, world, monkeypatch):
    monkeypatch.setattr(Checkpoint, "load", None)
    known = known_answers(world)
    pairs = make("others", "--rejected", "other_image", "--repoint")
    kinds = {kind: [p for p in pairs if p["rejected_from"] == kind] for kind in ("other_image", "repointed")}
    assert len(kinds["other_image"]) >= 50 and len(kinds["repointed"]) >= 50
    for pair in pairs:
        asked = bare_question(pair["prompt"])
        truth = [known[source["path"]][asked] for source in pair["sources"]]
        assert pair["chosen"] == truth[pair["target"] - 1] != pair["rejected"] and pair["rejected"] in truth
        assert pair["true_of_another"] and "perplexity" not in pair
    assert make("others", "--rejected", "other_image", "--repoint") == pairs
    assert make("seeded", "--rejected", "other_image", "--repoint", "--seed", 1) != pairs


def test_sources_of_the_miniature_repeat_with_their_seed(world, tmp_path, monkeypatch):
    for name, seed in (("again", 0), ("other", 1)):
        words = ["make_source", "--output", str(tmp_path / name), "--num_pictures", "60", "--seed", str(seed)]
        monkeypatch.setattr(sys, "argv", words)
        make_source.main()
    first, again, other = (folder / "source.json" for folder in (world, tmp_path / "again", tmp_path / "other"))
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    name = json.loads(first.read_text())[7]["image"]
    assert (world / "images" / name).read_bytes() == (tmp_path / "again/images" / name).read_bytes()


def test_the_launch_script_hands_on_its_knobs_and_flags(tmp_path):
    (tmp_path / "torchrun").write_text('#!/bin/bash\nprintf "%s\\n" "$PWD" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    own = Path(sys.executable).parent  # whose python has torch
    environment = {"PATH": f"{tmp_path}:{own}:/usr/bin:/bin", "MODEL": "my model", "NPROC": "3", "IMAGES": "i.zip"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        ["bash", SCRIPT, "--seed", "7"], cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    folder, *words = done.stdout.splitlines()
    module = words.index("-m")
    assert folder == "/" and "--nproc_per_node=3" in words[:module]
    assert words[module + 1] == "data_gen.gen_chosen_rejected" and len(SCRIPT.read_text().splitlines()) <= 40
    own, model, *_ = parse(gen_chosen_rejected.GROUPS, None, words[module + 2 :])
    assert (model.model_name_or_path, model.image_folder, own.seed, model.batch_size) == ("my model", "i.zip", 7, 8)


# ---- several processes and kills


def launch(world, output, processes, *more):
    command = ["torchrun", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    command += ["-m", "data_gen.gen_chosen_rejected", *flags(world, output, *more)]
    log = output.with_name(f"{output.name}.log")
    return forks.Job(command, cwd=ROOT, new_session=True, stdout=log, stderr=log), log


FILES = ("pairs.json", "dropped.jsonl", "summary.md", "answers.jsonl")


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_two_processes_killed_and_started_again_write_the_same_files_as_one(make, world, made, tmp_path):
    output = tmp_path / "killed"
    (job, log), deadline = launch(world, output, 2), time.monotonic() + 60
    while not list(output.glob("answers.jsonl.parts/*.jsonl")) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert job.poll() is None, f"the run was over before it was killed: {log.read_text()}"
    kill_with_workers(job)
    assert not (output / "pairs.json").exists()
    job, log = launch(world, output, 2)
    assert job.wait(timeout=120) == 0, log.read_text()
    assert contents(output) == contents(made) and not (output / "answers.jsonl.parts").exists()


@pytest.mark.parametrize("step", ["dropped.jsonl", "pairs.json", "run.json"])
def test_an_interrupted_selection_is_finished_by_the_next_start(make, made, tmp_path, monkeypatch, step):
    def interrupted(path, text):
        if path.name == step:
            raise KeyboardInterrupt
        write_text(path, text)

    write_text = gen_chosen_rejected.write_run_json.__globals__["write_text"]
    answered(made, tmp_path / "cut")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data_gen.gen_chosen_rejected.output.write_text", interrupted)
        patch.setattr("llava.runtime.write_text", interrupted)
        make("cut")
    make("cut")
    assert contents(tmp_path / "cut") == contents(made)


# ---- bad input


class TestRefused:
    def error(self, make, capsys, *more):
        with pytest.raises(SystemExit) as ended:
            make("refused", *more)
        text = capsys.readouterr().err
        assert ended.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1
        return text

    def instructions(self, world, tmp_path, change):
        records = [json.loads(line) for line in (world / "made/instructions.jsonl").open()]
        change(records)
        (tmp_path / "bad.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return "--instructions", tmp_path / "bad.jsonl"

    def test_no_model(self, world, tmp_path, monkeypatch, capsys):
        words = flags(world, tmp_path / "refused")[2:]
        monkeypatch.setattr(sys, "argv", ["gen_chosen_rejected", *words])
        with pytest.raises(SystemExit):
            gen_chosen_rejected.main()
        assert "--model_name_or_path is missing" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (("--noise_std", 3), "--noise_std"),
            (("--noise_std", 3, "--degrade", "hidden"), "--noise_std"),
            (("--degrade", "hidden", "--endpoint", "http://127.0.0.1:9/v1"), "a server sees every picture"),
            (("--rejected", "other_image", "--degrade", "whole"), "--degrade"),
            (("--rejected", "other_image", "--endpoint", "http://127.0.0.1:9/v1"), "--endpoint"),
            (("--thresholds", "{"), "--thresholds"),
            (("--attention_layers", "9"), "layers 0 to 3"),
            (("--attention_layers", "none"), 'write "auto"'),
            (("--max_length_ratio", 0.5), "--max_length_ratio"),
            (("--image_folder", "nowhere"), "nowhere"),
            (("--instructions", "nowhere.jsonl"), "nowhere.jsonl: no such file"),
            (("--source", "nowhere.json"), "no such source file"),
            (("--seed", -1), "--seed"),
        ],
        ids=lambda value: str(value) if isinstance(value, str) else "",
    )
    def test_flags(self, make, capsys, more, said):
        assert said in self.error(make, capsys, *more)

    def test_records(self, make, capsys, world, tmp_path):
        bad = self.instructions(world, tmp_path, lambda records: records[3].pop("conversations"))
        assert "record 4" in self.error(make, capsys, *bad)
        bad = self.instructions(world, tmp_path, lambda records: records[3]["conversations"].reverse())
        assert "begin with a turn from human" in self.error(make, capsys, *bad)
        bad = self.instructions(world, tmp_path, lambda records: records[1].update(id=records[0]["id"]))
        assert "was there before" in self.error(make, capsys, *bad)

    def test_a_number_of_pictures_without_a_threshold(self, make, capsys, world, tmp_path):
        def seven(records):
            records[0] |= {
                "image": records[0]["image"][:1] * 7,
                "image_type": "sequence",
                "target": 1,
                "is_refusal": False,
            }
            head = "".join(f"Image{n}:<image>\n" for n in range(1, 8))
            records[0]["conversations"][0]["value"] = f"{head}In Image1, what?"

        assert "threshold for sequence of 7" in self.error(make, capsys, *self.instructions(world, tmp_path, seven))

    def test_a_folder_of_other_pairs(self, make, capsys, tmp_path):
        make("refused", "--rejected", "other_image")
        assert "is of another run (rejected other_image there, model here)" in self.error(make, capsys)

    def test_answers_of_another_model_run(self, make, capsys, made, tmp_path):
        answered(made, tmp_path / "refused")
        assert "max_new_tokens" in self.error(make, capsys, "--max_new_tokens", 5)
