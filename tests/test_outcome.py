"""What lies beside trained weights for people: the curves, and the card."""

import math
import os

import matplotlib.figure
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file

from tests.test_trainer import make_trainer, pairs  # noqa: F401  fixtures
from train.llava_hound_dpo import outcome
from train.llava_hound_dpo.checkpoints import mark_complete
from train.llava_hound_dpo.outcome import draw_curves, licence_of, write_card

LOG = {"rewards/margins": 0.2, "attention/ratio": 0.6, "logps/chosen": -3.0, "losses/dpo": 0.6}
HISTORY = [
    {"step": 1, "loss": 1.0, **LOG},
    {"step": 2, "loss": 0.5, **LOG},
    {"step": 2, "eval_loss": 0.75, "eval_attention/ratio": 0.55},
    {"step": 2, "train_runtime": 3.0, "train_loss": 0.7},
]
ABOUT = {"base": "owner/base", "data": "train.json: 9", "loss": "1 x (dpo)", "licence": "llama2"}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A function that draws a history and returns {title: {label: points}}."""
    figures = []

    class Figure(matplotlib.figure.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(matplotlib.figure, "Figure", Figure)

    def draw(history):
        draw_curves(history, tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as picture:
            assert picture.format == "PNG" and min(picture.size) > 300
        return {
            axes.get_title(): {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
            for axes in figures[-1].axes
        }

    return draw


def test_curves_are_the_points_of_the_log_in_order(drawn):
    found = drawn(HISTORY)
    assert len(found) == 4
    assert found["loss"] == {"training": [[1, 1.0], [2, 0.5]], "held out": [[2, 0.75]]}
    assert found["attention ratio R"] == {"training": [[1, 0.6], [2, 0.6]], "held out": [[2, 0.55]]}
    assert list(found["margin of DPO (rewards)"]) == ["training"]


def test_what_a_recipe_has_not_is_said_and_no_number_is_no_point(drawn):
    found = drawn([{"step": 1, "loss": math.nan, "logps/chosen": -1.0}])
    assert found["margin of DPO (rewards): not of this recipe"] == {}
    assert found["log-prob of the chosen answers, nats"] == {"training": [[1, -1.0]]}
    assert drawn([])


def test_the_card_tells_base_data_recipe_numbers_and_licence(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    write_card(tmp_path, ABOUT, HISTORY)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("owner/base", "llama2", "peft")
    for line in ("data | train.json: 9", "licence | llama2", "attention/ratio | 0.6 | 0.55", "loss | 0.5 | 0.75"):
        assert f"| {line} |" in card.content
    assert "More Information Needed" not in card.content


def test_the_licence_is_read_beside_the_base(tmp_path):
    assert licence_of(tmp_path) is None
    write_card(tmp_path, ABOUT | {"licence": None}, [])
    assert licence_of(tmp_path) is None and outcome.UNKNOWN in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    assert licence_of(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert licence_of(tmp_path) is None


def test_every_saved_adapter_has_the_card_and_not_the_template(make_trainer, tmp_path):  # noqa: F811
    trainer = make_trainer("--save_steps", "1", "--max_steps", "1")
    trainer.about = ABOUT
    trainer.train()
    text = (tmp_path / "out/checkpoint-1/README.md").read_text()
    assert text.startswith("---\n") and "| loss | " in text and "# checkpoint-1" in text


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_of_tensors_have_the_permissions_of_other_files(tmp_path, mask, mode):
    """safetensors makes its files readable by their owner only, whatever the umask says."""
    (tmp_path / "checkpoint-1").mkdir()
    before = os.umask(mask)
    try:
        for path in (tmp_path / "a.safetensors", tmp_path / "checkpoint-1/b.safetensors"):
            save_file({"x": torch.zeros(1)}, path)
        mark_complete(tmp_path, {})
        assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.safetensors")} == {mode}
        assert (tmp_path / "complete.json").stat().st_mode & 0o777 == mode
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
