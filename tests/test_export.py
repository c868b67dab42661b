"""Exported checkpoints: loaded by plain transformers, equal to their source, in both layouts."""

import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration

import scripts.export
from llava.checkpoints import open_checkpoint
from llava.families.llava15 import vicuna_v1
from scripts.export import example, logits
from tests.dialects import make_formats


@pytest.fixture(scope="module")
def formats(tmp_path_factory):
    return make_formats(tmp_path_factory.mktemp("formats"))


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def export(monkeypatch, capsys):
    """Runs `scripts.export` as its command line would."""

    def run(source, output, *words):
        monkeypatch.setattr(
            sys, "argv", ["export", "--model_name_or_path", str(source), "--output", str(output), *words]
        )
        code = 0
        try:
            scripts.export.main()
        except SystemExit as ended:
            code = ended.code
        return Done(code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("source", "layout"), [("adapter", "hf"), ("original_lora", "hf"), ("original_lora", "original")]
)
def test_round_trip_in_fp32(export, formats, tmp_path, source, layout):
    done = export(getattr(formats, source), tmp_path / "out", "--format", layout, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    opened = open_checkpoint(str(formats.adapter))
    expected, family = opened.load().eval(), opened.family
    probe = example(family)
    if layout == "hf":
        found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
        tokenizer = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    else:
        written = open_checkpoint(str(tmp_path / "out"))
        found, tokenizer = written.load().eval(), written.family.tokenizer
    torch.testing.assert_close(logits(found, family, probe), logits(expected, family, probe), atol=1e-5, rtol=0)
    text = "In Image2, what  colour<image>?"
    assert tokenizer(text)["input_ids"] == family.tokenizer(text)["input_ids"]


def test_tensors_have_the_names_of_the_published_llava_hf_checkpoint(export, formats, tmp_path):
    export(formats.adapter, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.model.norm.weight",
        "multi_modal_projector.linear_1.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.0.layer_norm1.weight",
        "vision_tower.vision_model.post_layernorm.weight",
    } <= names
    prefixes = (
        "language_model.model.",
        "language_model.lm_head.",
        "multi_modal_projector.",
        "vision_tower.vision_model.",
    )
    assert all(name.startswith(prefixes) for name in names)


def test_bf16_prints_its_difference(export, formats, tmp_path):
    done = export(formats.adapter, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "largest difference" in line)
    assert 0 < float(line.split("source: ")[1].split()[0]) < 0.5


def test_chat_template_is_the_template_of_training(export, formats, tmp_path):
    export(formats.adapter, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert prompt == vicuna_v1([("<image>\nWhat is this?", None)])
    turns = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C?"},
    ]
    whole = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert whole == vicuna_v1([("A?", "B"), ("C?", None)])


def test_a_folder_with_files_is_not_overwritten(export, formats, tmp_path):
    (tmp_path / "precious").touch()
    done = export(formats.adapter, tmp_path)
    assert done.returncode == 2 and "not empty" in done.stderr


def test_original_layout_without_a_sentencepiece_model_says_where_to_get_one(export, formats, tmp_path):
    done = export(formats.llava_hf, tmp_path / "out", "--format", "original")
    assert done.returncode == 2 and "tokenizer.model" in done.stderr
