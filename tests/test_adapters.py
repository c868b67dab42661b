"""Adapters as others save and move them: older names, the hub, another folder, a base of fewer bits, two of them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llava.checkpoints import open_checkpoint
from llava.families.llava15 import Llava15
from llava.weights import UNREAD
from tests.test_trainer import make_trainer, pairs  # noqa: F401  fixtures
from train.llava_hound_dpo.arguments import ModelArguments
from train.llava_hound_dpo.model import make_trainable

OLDER_TARGETS = r".*language_model\.model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj"  # of transformers 4


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    """(folder of a LoRA adapter with a trained projector, its logits), by plain peft."""
    folder = tmp_path_factory.mktemp("own") / "adapter"
    torch.manual_seed(0)
    plain = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules=Llava15.lora_targets(), init_lora_weights=False,
        modules_to_save=list(Llava15.projectors),
    )  # fmt: skip
    model = get_peft_model(plain, settings).eval()
    model.save_pretrained(folder)
    return folder, logits(model)


@torch.no_grad()
def logits(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, 300, *[model.config.image_token_id] * 36, 301, 302, 303]])
    return model(input_ids=ids, pixel_values=torch.randn(1, 3, 72, 72, generator=generator)).logits


@pytest.fixture
def changed(adapter, tmp_path):
    """A function that copies the adapter with other names of its tensors and another config; gives its folder."""

    def change(rename=str, name="copy", **settings):
        folder = Path(shutil.copytree(adapter[0], tmp_path / name))
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({rename(key): t for key, t in tensors.items()}, folder / "adapter_model.safetensors")
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return folder

    return change


def transformers4(name):
    name = name.replace("model.model.language_model.", "model.language_model.model.")
    return name.replace("model.model.multi_modal_projector", "model.multi_modal_projector")


def nested(name):
    return name.replace("model.language_model.", "model.language_model.model.")


def raw(name):
    return name.replace(".weight", ".default.weight") if "lora" in name else name


@pytest.mark.parametrize(
    ("rename", "targets", "count"),
    [
        (transformers4, "pattern", 60),
        (transformers4, "list", 60),
        (transformers4, "older pattern", 60),
        (transformers4, "older list", 60),
        (nested, "older pattern", 56),
        (raw, "pattern", 56),
        (lambda name: name.removeprefix("base_model.model."), "pattern", 60),
        (lambda name: f"module.{name}", "list", 60),
        (lambda name: f"_orig_mod.{transformers4(name)}", "older pattern", 60),
    ],
)
def test_names_of_other_versions_are_renamed_and_loaded(adapter, changed, caplog, rename, targets, count):
    blocks = [f"layers.{n}.self_attn.{p}_proj" for n in range(4) for p in "qkvo"]
    blocks += [f"layers.{n}.mlp.{p}_proj" for n in range(4) for p in ("gate", "up", "down")]
    wanted = {
        "pattern": Llava15.lora_targets(), "older pattern": OLDER_TARGETS,
        "list": [f"language_model.{block}" for block in blocks],
        "older list": [f"language_model.model.{block}" for block in blocks],
    }[targets]  # fmt: skip
    caplog.set_level("INFO")
    model = open_checkpoint(str(changed(rename, target_modules=wanted))).load().eval()
    torch.testing.assert_close(logits(model), adapter[1])
    (line,) = [record.getMessage() for record in caplog.records if "names of other versions" in record.getMessage()]
    assert f"copy: {count} tensors have" in line


def test_names_of_today_are_not_mentioned(adapter, changed, caplog):
    caplog.set_level("INFO")
    torch.testing.assert_close(logits(open_checkpoint(str(changed())).load().eval()), adapter[1])
    assert "names of other versions" not in caplog.text


@pytest.mark.parametrize("kind", ["missing", "unexpected", "twice", "mis-shaped"])
def test_older_names_are_as_strict(changed, kind):
    folder = changed(transformers4)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.language_model.model.layers.2.self_attn.v_proj.lora_A.weight"
    tensor = tensors.pop(name)
    new = {
        "missing": {}, "mis-shaped": {name: tensor[:, :-1].clone()},
        "unexpected": {name: tensor, name.replace("layers.2", "layers.9"): tensor.clone()},
        "twice": {name: tensor, name.replace("language_model.model", "model.language_model"): tensor.clone()},
    }[kind]  # fmt: skip
    save_file({**tensors, **new}, path)
    said = "twice, under an older and a newer name" if kind == "twice" else rf"{kind} tensors: .*layers\.[29]\.self"
    with pytest.raises(ValueError, match=said):
        open_checkpoint(str(folder)).load()


# ---- where an adapter and its base are


def into_cache(home, name, folder):
    """A repository of the hub as huggingface_hub keeps it after a download."""
    place = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / "0123abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123abc")
    return place / "snapshots" / "0123abc"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts a folder into an own cache of the hub."""
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        name = "HF_HUB_CACHE" if "constants" in module else "TRANSFORMERS_CACHE"
        monkeypatch.setattr(f"{module}.{name}", str(tmp_path / "hub"), raising=False)
    return lambda name, folder: into_cache(tmp_path, name, folder)


def test_an_adapter_of_the_hub_on_a_base_of_the_hub(adapter, checkpoint, changed, hub):
    hub("someone/base", checkpoint)
    snapshot = hub("someone/adapter", changed(base_model_name_or_path="someone/base"))
    opened = open_checkpoint("someone/adapter")
    assert (opened.dialect, opened.path, opened.base.path) == ("PEFT adapter", str(snapshot), "someone/base")
    torch.testing.assert_close(logits(opened.load().eval()), adapter[1])
    assert opened.family.num_image_tokens() == 36 and opened.stored.total() > 0
    assert open_checkpoint("someone/adapter", base=checkpoint).base.path == checkpoint


def test_checkpoints_of_a_training_are_not_downloaded():
    assert "checkpoint-*/*" in UNREAD


def test_an_adapter_names_its_base_by_an_absolute_path(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(checkpoint).parent)
    policy = make_trainable(open_checkpoint(Path(checkpoint).name).load(), Llava15, ModelArguments("x", lora_r=2))
    policy.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(Path(checkpoint).resolve()) and "bits" not in saved
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("adapter").load()
    policy = make_trainable(open_checkpoint(checkpoint).load(), Llava15, ModelArguments("x", lora_r=2))
    assert policy.peft_config["default"].base_model_name_or_path == str(Path(checkpoint).resolve())


def test_a_relative_base_of_a_run_elsewhere_is_found_above_the_adapter(changed, checkpoint, tmp_path, monkeypatch):
    folder = changed(base_model_name_or_path="models/base", name="output")
    shutil.copytree(checkpoint, tmp_path / "models" / "base")
    monkeypatch.chdir(os.sep)
    assert open_checkpoint(str(folder)).base.path == str(tmp_path / "models" / "base")


def test_a_base_that_is_gone_is_named_with_the_flag(changed):
    with pytest.raises(FileNotFoundError, match=r"copy stands on /gone/base: no such .*--base_model"):
        open_checkpoint(str(changed(base_model_name_or_path="/gone/base")))


@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_the_folder_of_a_training_feeds_plain_transformers_as_the_training_did(make_trainer, tmp_path, aspect):  # noqa: F811
    trainer = make_trainer("--image_aspect_ratio", aspect)
    trainer.save_model(str(tmp_path / "saved"))
    processor, family = AutoProcessor.from_pretrained(tmp_path / "saved"), trainer.family
    picture = Image.radial_gradient("L").convert("RGB").resize((144, 72))
    message = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "\nWhat?"}]}
    found = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    torch.testing.assert_close(found["pixel_values"], family.pixels([picture])["pixel_values"], atol=1e-6, rtol=0)
    wanted = family.expand(family.encode_prompt("<image>\nWhat?"), [family.image(picture.size)])
    assert found["input_ids"][0].tolist() == wanted
    assert open_checkpoint(str(tmp_path / "saved")).family.pad == (aspect == "pad")


# ---- what it stood on


def test_the_bits_of_the_base_are_recorded_and_said(checkpoint, tmp_path, caplog):
    arguments = ModelArguments("x", lora_r=2, bits=4)
    make_trainable(open_checkpoint(checkpoint).load(), Llava15, arguments).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["bits"] == 4
    caplog.clear()
    open_checkpoint(str(tmp_path / "adapter")).load()
    assert "adapter was trained on a base of 4 bits, which is read at full precision here" in caplog.text
    plain = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    with pytest.warns(UserWarning, match=r"\['bits'\]"):  # and goes on
        assert PeftModel.from_pretrained(plain, tmp_path / "adapter")


def test_an_adapter_on_an_adapter_is_both(adapter, changed, checkpoint):
    """PEFT would put the upper one in the place of the lower one."""
    upper = changed(lambda name: name, base_model_name_or_path=str(adapter[0]))
    tensors = load_file(upper / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    save_file(tensors, upper / "adapter_model.safetensors")
    lower = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(checkpoint), adapter[0])
    wanted = PeftModel.from_pretrained(lower.merge_and_unload(), upper).eval()
    opened = open_checkpoint(str(upper))
    found = logits(opened.load().eval())
    torch.testing.assert_close(found, logits(wanted), atol=1e-5, rtol=1e-5)
    assert (found - adapter[1]).abs().max() > 1e-2 and opened.check_tensors() > 0
