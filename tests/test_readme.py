"""What the README names is there: files, links, modules, flags."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_and_paths_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    folders = "scripts|train|inference|inference_optimization|data_gen|llava|tests"
    paths = re.findall(rf"(?:bash |`)((?:{folders})/[\w./]+)", README)
    assert links and paths
    for name in [*links, *paths]:
        assert (ROOT / name).exists(), name


def test_modules_can_be_run():
    modules = re.findall(r"python -m ([\w.]+)", README)
    assert "scripts.doctor" in modules
    for name in modules:
        assert name == "venv" or importlib.util.find_spec(name), name


def test_flags_exist():
    """Of training, or of a parser of another command."""
    from dataclasses import fields

    from train.llava_hound_dpo.arguments import DataArguments, LossArguments, ModelArguments, TrainArguments

    groups = (ModelArguments, DataArguments, LossArguments, TrainArguments)
    known = {field.name for group in groups for field in fields(group)} | {
        "help",
        "ntasks-per-node",
    }  # the last of srun
    for folder in ("train", "inference", "inference_optimization", "data_gen", "scripts", "llava"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            known |= set(re.findall(r'"--([a-z][\w-]*)"', text)) | set(re.findall(r"(?m)^    (\w+): .+ = flag\(", text))
    flags = re.findall(r"(?<![\w-])--([a-z][\w-]*)", README)
    assert len(flags) > 20 and set(flags) <= known, set(flags) - known


def test_anchors_are_headings():
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in README.splitlines()
                if line.startswith("#")}  # fmt: skip
    anchors = re.findall(r"\]\(#([\w-]+)\)", README)
    assert anchors and set(anchors) <= headings


def test_nothing_is_left_to_fill_in():
    assert not re.search(r"@[A-Z]+@", README)
