"""The same prompts here, in plain transformers, and on the real `transformers serve` of the exported folder."""

import importlib.util
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import scripts.prove
from inference.llava_hound_dpo import measure, run_inference
from llava.checkpoints import open_checkpoint
from scripts.export import export
from scripts.miniature.make_data import main as make_data
from scripts.prove import ProveSettings
from tests.conftest import BASE

NEEDS_SERVER = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn")),
    reason="`transformers serve` needs fastapi and uvicorn, which are not installed",
)
FORMATS = ("sequence", "collage", "pip", "single")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """(test set of 12 prompts, three of each format, their pictures)"""
    folder = tmp_path_factory.mktemp("asked")
    argv, sys.argv = sys.argv, ["make_data", "--output", str(folder), "--num_train", "4", "--num_test", "12"]
    try:
        make_data()
    finally:
        sys.argv = argv
    records = json.loads((folder / "test.json").read_text())
    assert {record["image_type"]: 3 for record in records} == dict.fromkeys(FORMATS, 3)
    return folder / "test.json", folder / "images"


@pytest.fixture(scope="module")
def exported(tmp_path_factory, asked):
    """The miniature's base as a folder in float32."""
    folder = tmp_path_factory.mktemp("exported") / "base"
    checkpoint = open_checkpoint(BASE)
    export(checkpoint, folder, "float32", "hf", scripts.export.drawn(checkpoint.family))
    return folder


@pytest.fixture
def prove(asked, monkeypatch, capsys):
    """Runs `scripts.prove` as its command line would: (exit code, what it printed, errors)."""

    def run(model, *words):
        argv = ["prove", "--model", str(model), "--questions", str(asked[0]), "--image_folder", str(asked[1])]
        monkeypatch.setattr(sys, "argv", [*argv, "--max_new_tokens", "8", *map(str, words)])
        try:
            code = scripts.prove.main()
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run


@contextmanager
def running_server(folder):
    """URL of `transformers serve` with a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--device", "cpu"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                assert job.poll() is None, "the server ended"
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        job.kill()
        job.wait()


@pytest.fixture(scope="module")
def server(exported):
    """URL of `transformers serve` with the exported folder."""
    with running_server(exported) as url:
        yield url


@NEEDS_SERVER
def test_a_server_and_plain_transformers_answer_as_we_do(prove, exported, server, tmp_path):
    code, output, errors = prove(exported, "--endpoint", server, "--output", tmp_path / "answers.jsonl")
    assert code == 0, output + errors
    assert "plain transformers: 12 of 12 answers are the same" in output
    assert f"the server at {server}: 12 of 12 answers are the same" in output
    assert float(re.search(r"first token's probability: (\S+)", output)[1]) < 1e-4
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and all(len(set(line["answers"].values())) == 1 for line in lines)
    assert len({line["answers"]["plain transformers"] for line in lines}) > 1 and not any(
        line["differences"] for line in lines
    )


@NEEDS_SERVER
def test_its_answers_measured_are_those_of_our_inference(exported, server, asked, tmp_path, monkeypatch):
    """Texts, tokens and ends the same, and so all that is measured."""
    found = {}
    for name, module, more in (
        ("ours", run_inference, ()), ("served", run_inference, ("--endpoint", server)),
        ("measured", measure, ("--answers", tmp_path / "served.jsonl")),
    ):  # fmt: skip
        words = ["--model_name_or_path", exported, "--data_path", asked[0], "--image_folder", asked[1]]
        words += ["--num_workers", 0, "--output", tmp_path / f"{name}.jsonl", *more]
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        module.main()
        found[name] = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    for ours, served, measured in zip(*found.values(), strict=True):
        assert served["attention_ratio"] is served["confidence"] is served["perplexity"] is None
        for name in ("question_id", "text", "num_tokens", "is_complete"):
            assert ours[name] == served[name] == measured[name]
        for name in ("attention_ratio", "attention_ratio_by_layer", "attention_by_image", "confidence", "perplexity"):
            assert measured[name] == pytest.approx(ours[name], abs=1e-5)


@NEEDS_SERVER
def test_the_server_refuses_another_model_in_one_line(prove, exported, server):
    code, _, errors = prove(exported, "--endpoint", server, "--endpoint_model", "another")
    assert code == 2 and "error: " in errors and "--endpoint_model another" in errors


def test_no_server_is_one_line_before_any_weight_is_loaded(prove, exported):
    code, output, errors = prove(exported, "--endpoint", "http://127.0.0.1:9/v1")
    assert code == 2 and "the server cannot be reached (Connection refused)" in errors and "--endpoint" in errors
    assert "loaded" not in output


def test_a_model_that_is_no_export_is_exported_first(prove):
    code, output, _ = prove(BASE, "--num", "4")
    assert code == 0 and "exporting" in output and "4 of 4 answers are the same" in output


def test_answers_that_differ_are_shown_with_the_first_token_and_both_probabilities(
    prove, exported, asked, tmp_path, monkeypatch
):
    """Of a folder whose weights were exchanged after the export."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in exported.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    head = tensors["language_model.lm_head.weight"]
    tensors["language_model.lm_head.weight"] = head + head.std() * torch.randn(
        head.shape, generator=torch.Generator().manual_seed(0)
    )
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(scripts.prove, "exported", lambda *_: broken)
    code, output, _ = prove(exported, "--output", tmp_path / "answers.jsonl")
    same = int(re.search(r"plain transformers: (\d+) of 12", output)[1])
    assert code == 1 and same < 12
    output = output.partition(scripts.prove.PILLOW)[0]  # which asks again where torchvision is installed
    found = re.findall(r"  (\S+): token (\d+) is (.*) \((0\.\d+)\) here, (.*) \((0\.\d+)\) there", output)
    assert len(found) == 12 - same
    model, family = open_checkpoint(str(exported)).load().eval(), open_checkpoint(str(exported)).family
    job = ProveSettings(model=str(exported), questions=asked[0], image_folder=str(asked[1])).job()
    for id, place, ours, probability, theirs, other in found:
        assert ours != theirs and float(probability) >= float(other)
        if place == "1":  # the most likely first token, by a forward of our own
            number = next(n for n, question in enumerate(job.questions) if question.id == id)
            one = scripts.prove.asked_of(family, job.questions[number], [
                job.store.open(name) for name in job.questions[number].images
            ])  # fmt: skip
            ids = family.expand(one.ids, family.images([picture.size for picture in one.pictures]))
            with torch.no_grad():
                best = model(torch.tensor([ids]), **family.pixels(one.pictures)).logits[0, -1].softmax(dim=-1).max()
            assert float(probability) == pytest.approx(best.item(), abs=1e-3)
