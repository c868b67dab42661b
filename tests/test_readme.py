"""What the README names is there: files, links, modules, flags."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_and_paths_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    paths = re.findall(r"(?:bash |`)((?:scripts|train|inference|llava|tests)/[\w./]+)", README)
    assert links and paths
    for name in [*links, *paths]:
        assert (ROOT / name).exists(), name


def test_modules_can_be_run():
    modules = re.findall(r"python -m ([\w.]+)", README)
    assert "scripts.doctor" in modules
    for name in modules:
        assert name == "venv" or importlib.util.find_spec(name), name


def test_flags_of_training_exist():
    from dataclasses import fields

    from train.llava_hound_dpo.arguments import DataArguments, LossArguments, ModelArguments, TrainArguments

    groups = (ModelArguments, DataArguments, LossArguments, TrainArguments)
    known = {field.name for group in groups for field in fields(group)}
    elsewhere = {"help", "fix-list", "format", "output", "answers", "questions", "data", "only_base_model"}
    for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", README):
        assert flag in known | elsewhere, flag


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@[A-Z]+@", README)
