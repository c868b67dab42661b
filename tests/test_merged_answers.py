"""Answers with an adapter merged into the weights below it, against those with it apart."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from inference.llava_hound_dpo import run_inference
from llava.checkpoints import PEFT_ADAPTER, WHOLE, Checkpoint, open_checkpoint
from llava.families import Llava15
from llava.merging import merge
from llava.settings import ModelSettings
from tests.conftest import COLOURS


@pytest.fixture
def answer(checkpoint, data, monkeypatch):
    """Answers a few questions with an adapter, in this process, and gives the answers and run.json."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=Llava15.lora_targets(), init_lora_weights=False)
    model = get_peft_model(open_checkpoint(checkpoint).load(), config)
    model.peft_config["default"].base_model_name_or_path = checkpoint
    model.save_pretrained(data.folder / "adapter")
    data([
        {"id": str(n), "image": [f"{COLOURS[n + k]}.png" for k in (0, 1)], "answer": COLOURS[n],
         "prompt": "Image1:<image>\nImage2:<image>\nIn Image1, what colour is it?"}
        for n in range(4)
    ], "test.json")  # fmt: skip

    def run(name, *more):
        flags = {
            "model_name_or_path": data.folder / "adapter", "data_path": data.folder / "test.json",
            "image_folder": data.images, "output": data.folder / f"{name}.jsonl", "max_new_tokens": 6, "num_workers": 0,
        }  # fmt: skip
        words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
        monkeypatch.setattr(sys, "argv", ["run_inference", *words, *more])
        run_inference.main()
        answers = [json.loads(line) for line in (data.folder / f"{name}.jsonl").read_text().splitlines()]
        return answers, json.loads((data.folder / f"{name}.run.json").read_text())

    return run


def test_merged_and_apart_give_the_same_answers(answer, capsys):
    """And each says which it was, in the log and in the identity, so that neither goes on with the other's answers."""
    merged, run = answer("merged", "--merge_adapter", "True")
    assert "the adapter is merged into the weights" in capsys.readouterr().out
    assert run["arguments"]["merge_adapter"] is True
    apart, run = answer("apart")  # on a CPU
    assert "the adapter is computed apart from the weights" in capsys.readouterr().out
    assert run["arguments"]["merge_adapter"] is False
    assert len(merged) == 4 and [a["text"] for a in merged] == [a["text"] for a in apart]
    for name in ("attention_ratio", "confidence"):
        apart_by = [abs(a[name] - b[name]) for a, b in zip(merged, apart, strict=True)]
        assert 0 < max(apart_by) < 1e-5
    with pytest.raises(SystemExit):
        answer("merged", "--merge_adapter", "False")
    assert "merge_adapter" in capsys.readouterr().err
    answer("below", "--only_base_model", "--merge_adapter", "True")
    assert "the adapter is" not in capsys.readouterr().out


@pytest.mark.parametrize(("choice", "has_gpu", "merges"), [
    ("auto", True, True), ("auto", False, False), ("True", False, True), ("False", True, False),
])  # fmt: skip
def test_an_adapter_is_merged_on_a_gpu_unless_told(monkeypatch, choice, has_gpu, merges):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    model, base = ModelSettings(model_name_or_path="", image_folder="", merge_adapter=choice), Checkpoint("base", WHOLE)
    assert model.merges(Checkpoint("adapter", PEFT_ADAPTER, base)) is merges and not model.merges(base)


def test_what_an_adapter_adds_is_rounded_once():
    """Base and adapter in bfloat16: the product in float32, added in float32; PEFT alone would round it before."""
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), LoraConfig(r=8, target_modules=["0"]))
    layer = model.to(torch.bfloat16).base_model.model[0]
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    a, b = (layer.get_submodule(f"lora_{x}.default").weight.float() for x in "AB")
    expected = (layer.base_layer.weight.float() + b @ a * layer.scaling["default"]).bfloat16()
    assert torch.equal(merge(model)[0][0].weight, expected)
