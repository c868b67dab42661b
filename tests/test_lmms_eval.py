"""Our models in lmms-eval: what a request asks, and the real harness on 20 questions against our own inference."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlavaForConditionalGeneration

from inference.llava_hound_dpo import evaluate, run_inference
from inference.lmms_eval_plugin.requests import cut, measures_of, region_fields, settings_of
from inference_optimization.llava_hound_dpo import run_adaptive
from llava.families.llava15 import Llava15
from llava.records import parse_question
from scripts.miniature.make_data import question, save_pictures
from scripts.miniature.prompts import sample_prompt
from tests.conftest import BASE
from tests.test_installed import installed  # noqa: F401  a fixture: the repository as pip installs it

OF_HARNESS = os.environ.get("AA_LMMS_EVAL_PYTHON")  # of an environment that has lmms-eval (docs/harnesses.md)
NEEDS_HARNESS = pytest.mark.skipif(
    not OF_HARNESS and importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed here, and AA_LMMS_EVAL_PYTHON names no python that has it",
)
MEASURED = ("attention_ratio", "attention_by_image", "confidence", "perplexity", "scale")
TYPES = ["sequence"] * 14 + ["pip"] * 4 + ["single"] * 2  # collages need a grid, which a harness cannot say
COMMANDS = {  # of ours: the program, its model, and whether an adapter is merged
    "plain": (run_inference.main, BASE, False),
    "steered": (run_adaptive.main, "adapter", True),
}
RUNS = {  # of the harness: the task, and --model_args
    "plain": ("aa_asked", f"pretrained={BASE}"),
    "steered": ("aa_asked", f"pretrained={BASE},adapter=adapter,merge_adapter=True,steer=target"),
    "chosen": ("aa_chosen", f"pretrained={BASE}"),
}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/documents.json}}}}
test_split: test
doc_to_visual: !function utils.pictures
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
"""
ASKED = """output_type: generate_until
generation_kwargs: {until: ["\\n"], max_new_tokens: 6, temperature: 0, top_p: 0, image_aspect_ratio: original}
metric_list: [{metric: exact_match, ignore_case: true, ignore_punctuation: true}]
"""
CHOSEN = """output_type: multiple_choice
doc_to_choice: choices
metric_list: [{metric: acc}]
"""
UTILS = """import pathlib, PIL.Image

def pictures(document):
    return [PIL.Image.open(pathlib.Path(__file__).parent / "images" / name) for name in document["image"]]
"""


# ---- what a request asks


def test_a_task_is_greedy_unless_it_samples():
    greedy = {"max_new_tokens": 1024, "num_beams": 1}
    assert settings_of({"until": ["\n\n"]}) == greedy
    assert settings_of({"temperature": 0.0, "top_p": None, "num_beams": None, "do_sample": True}) == greedy
    assert settings_of({"temperature": 0.7, "do_sample": False, "max_new_tokens": 8}) == greedy | {"max_new_tokens": 8}
    assert settings_of({"temperature": 0.7}) == greedy | {"temperature": 0.7, "top_p": 1.0}
    assert settings_of({"temperature": 0.7, "top_p": 0.9, "num_beams": 3}) == {
        "max_new_tokens": 1024, "num_beams": 3, "temperature": 0.7, "top_p": 0.9,
    }  # fmt: skip


def test_an_answer_ends_where_the_task_says():
    assert cut("red\n\nQ: and then?", ["\n\n"]) == cut("red ", None) == cut("red\n\nQ", "\n\n") == "red"
    assert cut("red. Or blue; red", [";", ".", ""]) == "red"


@pytest.mark.parametrize(
    ("prompt", "num_images", "expected"),
    [
        ("In Image2, what?", 2, "sequence"),
        ("Which are alike?", 2, "multi"),
        ("In image 1 a dog, in image 2 what?", 2, "multi"),
        ("In Image3, what?", 2, "multi"),
        ("In Image2, what is there that is not in Image1?", 2, "multi"),
        ("Image1:<image>\nImage2:<image>\nIn Image2, what?", 2, "sequence"),
        ("What?", 1, "single"),
        ("In image 1, what?", 1, "single"),
        ("In Image1 and Image2, what?", 3, "sequence"),
        ("In Image1 and Image2, what differs?", 2, "multi"),
        ("In Image3, what?", 1, "collage"),
        ("In Image1 and Image3, what?", 1, "collage"),
        ("In the inner picture, what?", 1, "pip"),
    ],
)
def test_the_format_follows_from_the_words(prompt, num_images, expected):
    # A picture as large as three of our cells side by side.
    assert region_fields(prompt, [(1424, 488)] * num_images)["image_type"] == expected


BEYOND = "In image 1 a dog, in image 2 what?", "In Image4, what is it?", "In images 1 and 3?"


@pytest.mark.parametrize("prompt", BEYOND)
def test_images_that_one_picture_does_not_show_as_cells_are_the_whole_picture(prompt):
    """Two names, or a cell beyond the grid: joined images of a benchmark. The question is asked, and nothing measured
    as if a part had been meant."""
    fields = region_fields(prompt, [(936, 488)])
    assert fields == {"image_type": "single", "points_elsewhere": True}
    record = parse_question({"id": "0", "image": "a.png", "prompt": f"<image>\n{prompt}", **fields}, "document 0")
    assert record.image_type == "single" and record.target == 0


def test_what_was_not_measured_is_not_logged():
    record = {"attention_ratio": None, "attention_by_image": [0.5, 0.5], "scale": 1.0, "text": "red"}
    assert measures_of(record) == {"attention_by_image": [0.5, 0.5], "scale": 1.0}
    assert measures_of(record | {"target": None, "targets": [1, 3]})["targets"] == [1, 3]


# ---- the real harness


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with 20 questions, as ours and as documents of a task, half of these without `<image>`; an adapter."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(3)
    questions, documents = [], []
    for number, image_type in enumerate(TYPES):
        prompt = sample_prompt(rng, "test", image_type)
        images = save_pictures(prompt.pictures(), folder / "images", "test", str(number))
        record = {"image": images, **question(prompt, rng)}
        questions.append({"id": str(number)} | {name: record[name] for name in ("image", "prompt", "answer")})
        asked = record["prompt"].rpartition("<image>\n")[2] if number % 2 else record["prompt"]
        choices = sorted({record["answer"], *record["others"], "red", "two"})
        documents.append({"question": asked, "image": images, "answer": record["answer"], "choices": choices})
    (folder / "questions.json").write_text(json.dumps(questions))
    (folder / "documents.json").write_text(json.dumps(documents))
    (folder / "utils.py").write_text(UTILS)
    for name, kind in (("aa_asked", ASKED), ("aa_chosen", CHOSEN)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder) + kind)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, lora_alpha=2, target_modules=Llava15.lora_targets(), init_lora_weights=False)
    get_peft_model(LlavaForConditionalGeneration.from_pretrained(BASE), lora).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def harness(world, installed):  # noqa: F811
    """{run: (its scores, its logged samples)}; all runs are one call of lmms-eval, on two processes."""
    common = {"model": "attention_aware", "include_path": str(world), "batch_size": "4", "log_samples": True}
    runs = [
        common | {"model_args": model_args, "tasks": task, "output_path": str(world / name)}
        for name, (task, model_args) in RUNS.items()
    ]
    (world / "runs.json").write_text(json.dumps(runs))  # JSON is YAML, too
    own = {"PYTHONPATH": str(installed), "HF_HOME": str(world / "hub"), "HF_DATASETS_OFFLINE": "1"}
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "lmms_eval"]
    done = subprocess.run(
        [OF_HARNESS or sys.executable, *launch, "--config", world / "runs.json"], cwd=world, env=os.environ | own,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert len(list(world.rglob("*_results.json"))) == len(RUNS), done.stdout[-3000:]
    found = {}
    for name, (task, _) in RUNS.items():
        (results,), (samples,) = (list((world / name).rglob(f"*_{kind}")) for kind in ("results.json", f"{task}.jsonl"))
        lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
        found[name] = json.loads(results.read_text())["results"][task], lines
    return found


@pytest.fixture(scope="module")
def ours(world):
    """{arm: (its accuracy, its records)}, by our commands."""
    for arm, (main, model, merge) in COMMANDS.items():
        flags = {"model_name_or_path": world / model, "merge_adapter": merge}
        flags |= {"data_path": world / "questions.json", "image_folder": world / "images"}
        flags |= {"output": world / f"{arm}.jsonl", "max_new_tokens": 6, "num_workers": 0, "attention_maps": 0}
        with pytest.MonkeyPatch.context() as patch:
            words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
            patch.setattr(sys, "argv", ["command", *words])
            main()
    files = [str(world / f"{arm}.jsonl") for arm in COMMANDS]
    evaluate.main(["--answers", *files, "--questions", f"{world}/questions.json", "--output", f"{world}/scores"])
    scores = json.loads((world / "scores/scores.json").read_text())["answers"]
    return {
        arm: (scores[arm]["overall"]["accuracy"], list(map(json.loads, Path(file).read_text().splitlines())))
        for arm, file in zip(COMMANDS, files, strict=True)
    }


@NEEDS_HARNESS
@pytest.mark.parametrize("arm", COMMANDS)
def test_the_score_is_that_of_evaluate(harness, ours, arm):
    """And every answer with its measures, in the logged samples, is that of our own inference."""
    (scores, samples), (accuracy, records) = harness[arm], ours[arm]
    assert scores["exact_match,none"] == pytest.approx(accuracy) and 0.4 < accuracy < 1
    assert [sample["filtered_resps"] for sample in samples] == [record["text"] for record in records]
    for sample, record in zip(samples, records, strict=True):
        (logged,) = sample["token_counts"]
        assert (logged["image_type"], logged["target"]) == (record["image_type"], record["target"])
        assert {name: logged[name] for name in MEASURED} == {
            name: pytest.approx(record[name], abs=1e-5) for name in MEASURED
        }


@NEEDS_HARNESS
def test_steering_was_on(harness):
    scales = {arm: [sample["token_counts"][0]["scale"] for sample in harness[arm][1]] for arm in COMMANDS}
    assert set(scales["plain"]) == {1.0} and 1.5 in scales["steered"]
    assert set(scales["steered"][-2:]) == {1.0}  # of single pictures nothing is told apart


@NEEDS_HARNESS
def test_given_answers_are_compared(harness, ours, world):
    """The model's own answer is marked as such, and no other of the choices."""
    documents = json.loads((world / "documents.json").read_text())
    for sample, record, document in zip(harness["chosen"][1], ours["plain"][1], documents, strict=True):
        marks = [is_own == "True" for _, is_own in sample["filtered_resps"]]
        assert marks == [choice == record["text"] for choice in document["choices"]]
        if any(marks):
            losses = [float(loss) for loss, _ in sample["filtered_resps"]]
            assert np.argmin(losses) == marks.index(True)
