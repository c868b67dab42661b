"""What cannot work here is refused by name, in one line, before any weight is read."""

import json
import sys

import pytest

from inference.llava_hound_dpo import run_inference
from llava.checkpoints import open_checkpoint
from tests.tiny import qwen_vl
from train.llava_hound_dpo import run_dpo


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen3_5", "linear attention carry state from one answer of a packed row into the next"),
        ("qwen3_5_moe", "linear attention"),
        ("mllama", "cross-attention"),
        ("gemma3", "both ways"),
        ("paligemma", "both ways"),
        ("internvl_chat", "converted one, whose name ends in -hf"),
        ("gpt2", "none of: .*Qwen-VL .*qwen2_5_vl.*InternVL"),
        (None, "none of: "),
    ],
)
@pytest.mark.parametrize("command", [run_dpo, run_inference])
def test_models_of_other_kinds(tmp_path, monkeypatch, capsys, command, model_type, reason):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=reason):
        open_checkpoint(str(tmp_path / "model"))
    flags = {"model_name_or_path": tmp_path / "model", "data_path": "none.json", "image_folder": tmp_path}
    flags |= {"output_dir" if command is run_dpo else "output": tmp_path / "out"}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["command", *words])
    try:
        with pytest.raises(SystemExit) as ended:
            command.main()
    finally:
        run_dpo._held.close()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and str(tmp_path / "model") in line


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ["linear_attention", "full_attention"] * 2}, "layers of linear_attention, whose state runs"),
        ({"attn_logit_softcapping": 50.0}, "caps its attention scores"),
        ({"use_bidirectional_attention": True}, "both ways"),
        (
            {"use_sliding_window": True, "sliding_window": 128, "layer_types": ["sliding_attention"] * 4},
            "sees the last 128 tokens alone in some layers .sliding_window., but rows may have 4096",
        ),
    ],
)
def test_language_models_whose_attention_is_something_else(tmp_path, changes, reason):
    qwen_vl.write(tmp_path, "qwen2_5_vl")
    assert open_checkpoint(str(tmp_path)).num_layers == 4
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["text_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=reason):
        open_checkpoint(str(tmp_path))


def test_a_window_as_long_as_any_row_is_none(tmp_path):
    qwen_vl.write(tmp_path, "qwen2_5_vl")
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["text_config"] |= {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert open_checkpoint(str(tmp_path)).num_layers == 4


@pytest.mark.parametrize(
    ("file", "message"),
    [("chat_template.jinja", "no chat template"), ("preprocessor_config.json", "no processor to load")],
)
def test_what_a_checkpoint_lacks(tmp_path, file, message):
    qwen_vl.write(tmp_path, "qwen2_5_vl")
    (tmp_path / file).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_checkpoint(str(tmp_path)).family  # noqa: B018


def test_a_template_of_an_older_processor_is_found(tmp_path):
    """In chat_template.json, which a tokenizer does not read."""
    qwen_vl.write(tmp_path, "qwen2_5_vl")
    text = open_checkpoint(str(tmp_path)).family.render([("<image>\nwhat?", "red")])
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert open_checkpoint(str(tmp_path)).family.render([("<image>\nwhat?", "red")]) == text


def test_pictures_are_not_cropped_where_a_family_sees_them_whole(tmp_path):
    qwen_vl.write(tmp_path, "qwen2_5_vl")
    with pytest.raises(ValueError, match="image_aspect_ratio crop: Qwen-VL sees pictures whole"):
        open_checkpoint(str(tmp_path), pad=False).family  # noqa: B018


def test_a_picture_longer_than_the_family_takes_is_named(tmp_path):
    qwen_vl.write(tmp_path, "qwen2_5_vl")
    with pytest.raises(ValueError, match="aspect ratio"):
        open_checkpoint(str(tmp_path)).family.image((3000, 4))
