"""Exported checkpoints: loaded by plain transformers, equal to their source, in both layouts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava.checkpoints import load_model, load_processor
from scripts.export import example, logits
from tests.dialects import make_formats

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    return make_formats(tmp_path_factory.mktemp("formats"))


def export(source, output, *words):
    command = [
        sys.executable,
        "-m",
        "scripts.export",
        "--model_name_or_path",
        str(source),
        "--output",
        str(output),
        *words,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("source", "layout"), [("adapter", "hf"), ("original_lora", "hf"), ("original_lora", "original")]
)
def test_round_trip_in_fp32(formats, tmp_path, source, layout):
    done = export(getattr(formats, source), tmp_path / "out", "--format", layout, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    expected = load_model(str(formats.adapter)).eval()
    probe = example(expected)
    if layout == "hf":
        found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
        processor = AutoProcessor.from_pretrained(tmp_path / "out")
    else:
        found, processor = load_model(str(tmp_path / "out")).eval(), load_processor(str(tmp_path / "out"))
    torch.testing.assert_close(logits(found, probe), logits(expected, probe), atol=1e-5, rtol=0)
    text = "In Image2, what  colour<image>?"
    own = load_processor(str(formats.adapter)).tokenizer
    assert processor.tokenizer(text)["input_ids"] == own(text)["input_ids"]


def test_bf16_prints_its_difference(formats, tmp_path):
    done = export(formats.adapter, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "largest difference" in line)
    assert 0 < float(line.split("source: ")[1].split()[0]) < 0.5


def test_chat_template_is_the_template_of_training(formats, tmp_path):
    from llava.conversation import render

    export(formats.adapter, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt == render([("<image>\nWhat is this?", None)])
    turns = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C?"},
    ]
    whole = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert whole == render([("A?", "B"), ("C?", None)])


def test_a_folder_with_files_is_not_overwritten(formats, tmp_path):
    (tmp_path / "precious").touch()
    done = export(formats.adapter, tmp_path)
    assert done.returncode == 2 and "not empty" in done.stderr


def test_original_layout_without_a_sentencepiece_model_says_where_to_get_one(formats, tmp_path):
    done = export(formats.llava_hf, tmp_path / "out", "--format", "original")
    assert done.returncode == 2 and "tokenizer.model" in done.stderr
