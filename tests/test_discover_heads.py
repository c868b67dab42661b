"""Heads by command: discovered, and taken by inference, AdaptViz, its tuner and the selection of pairs."""

import json
import sys
from pathlib import Path

import pytest

from data_gen.gen_chosen_rejected import __main__ as gen_chosen_rejected
from inference.llava_hound_dpo import run_inference
from inference_optimization.llava_hound_dpo import run_adaptive, tune
from llava.checkpoints import open_checkpoint
from llava.heads import Ranking
from scripts import discover_heads
from tests.conftest import make_world
from tests.test_heads import ranking

ROOT = Path(__file__).parent.parent
BASE = ROOT / "scripts/miniature/base"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, "--num_test", 40, "--num_validation", 60)
    return folder


@pytest.fixture
def call(world, tmp_path, monkeypatch):
    """Runs a command in this process on the miniature's questions; the path of its output."""

    def call(module, name, *more, data="data_path", **changes):
        flags = {"model_name_or_path": BASE, data: world / "test.json", "image_folder": world / "images"}
        flags |= {"output": tmp_path / name, "max_new_tokens": 6, "num_workers": 0, "batch_size": 16, **changes}
        words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [name, *words, *map(str, more)])
            module.main()
        return tmp_path / name

    return call


@pytest.fixture
def heads(call, world):
    return call(discover_heads, "heads.json", data_path=world / "validation.json")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestCommands:
    def test_the_layers_that_route_are_found(self, call, world, capsys):
        """Layers 1 and 2 of the shipped base; in layer 0 the last row cannot know the question yet."""
        found = Ranking.read(call(discover_heads, "heads.json", data_path=world / "validation.json"))
        printed = capsys.readouterr().out
        assert {one.layer for one in found.ranking[:4]} <= {1, 2} and found.ranking[0].auc > 0.9
        assert found.ranking[0].accuracy > found.chance + 0.2
        assert (found.num_prompts, len(found.ranking)) == (60, 16) and found.data.startswith("60 (")
        assert found.weights == found.base_weights == open_checkpoint(str(BASE)).digest
        assert f"{found.ranking[0].auc:.3f}" in printed and len(printed.splitlines()) > 11

    def test_a_few_prompts_of_some_layers(self, call, world):
        """Single pictures are passed over, test sets are read as well."""
        found = Ranking.read(call(discover_heads, "few.json", "--limit", 9, "--layers", "1-2"))
        assert found.num_prompts == 9 and {one.layer for one in found.ranking} == {1, 2}

    def test_answers_are_the_same_and_the_ratio_is_that_of_the_heads(self, call, heads, tmp_path):
        plain = lines(call(run_inference, "plain.jsonl"))
        on_heads = lines(call(run_inference, "heads.jsonl", "--attention_heads", heads, "--top_heads", 2))
        selected = Ranking.read(heads).top(2)
        for a, b in zip(plain, on_heads, strict=True):
            assert a["text"] == b["text"] and a["confidence"] == b["confidence"]
            assert len(b["attention_ratio_by_layer"]) == len(selected.layers)
        assert sum(a["attention_ratio"] != b["attention_ratio"] for a, b in zip(plain, on_heads, strict=True)) > 20
        assert json.loads((tmp_path / "heads.run.json").read_text())["attention_heads"] == selected.to_json()

    def test_maps_are_those_of_the_heads(self, call, heads):
        for a in lines(call(run_inference, "maps.jsonl", "--attention_heads", heads, "--top_heads", 1)):
            if "attention_map" in a and a["image_type"] == "sequence":
                total = [sum(map(sum, image["mass"])) for image in a["attention_map"]]
                assert [t / sum(total) for t in total] == pytest.approx(a["attention_by_image"], abs=5e-3)

    def test_adaptviz_scales_the_heads_alone(self, call, heads, tmp_path):
        flags = ("--alpha", 4, "--rule", "add", "--attention_heads", heads)
        every = lines(call(run_adaptive, "every.jsonl", *flags[:4]))
        same = lines(call(run_adaptive, "same.jsonl", *flags, "--top_heads", 16))
        two = lines(call(run_adaptive, "two.jsonl", *flags, "--top_heads", 2))
        assert [a["text"] for a in every] == [a["text"] for a in same]
        record = json.loads((tmp_path / "two.run.json").read_text())
        assert record["adaptviz"]["heads"] == record["attention_heads"] == Ranking.read(heads).top(2).to_json()
        plain = lines(call(run_inference, "plain.jsonl", *flags[4:], "--top_heads", 2))
        steered = [(a, b) for a, b in zip(plain, two, strict=True) if b["scale"] != 1]
        raised = [b["attention_ratio"] - a["attention_ratio"] for a, b in steered]
        assert len(raised) > 20 and sum(raised) / len(raised) > 0.02

    def test_measured_and_scaled_heads_can_differ(self, call, heads, tmp_path):
        call(run_adaptive, "a.jsonl", "--attention_heads", heads, "--top_heads", 1, "--scale_heads", "all")
        record = json.loads((tmp_path / "a.run.json").read_text())
        assert record["attention_heads"] and record["adaptviz"]["heads"] is None
        call(run_adaptive, "b.jsonl", "--scale_heads", heads, "--top_heads", 1, "--scale_layers", "0-1")
        record = json.loads((tmp_path / "b.run.json").read_text())
        assert record["attention_heads"] is None and record["attention_layers"] == [2]
        assert set(record["adaptviz"]["heads"]) < {"0", "1"} and record["adaptviz"]["layers"] == [0, 1]

    def test_what_is_tuned_on_heads_is_run_on_these_heads(self, call, heads):
        few = ("--scopes", "target", "--rules", "add", "--factors", 4, "--share", 0.5)
        folder = call(tune, "tuned", "--attention_heads", heads, "--top_heads", 3, *few)
        record = json.loads((folder / "tuned.json").read_text())
        assert record["adaptviz"]["heads"] == Ranking.read(heads).top(3).to_json()
        answers = lines(call(run_adaptive, "chosen.jsonl", "--config", folder / "tuned.json"))
        rights = [a["text"] == a["answer"] for a in answers if a["question_id"] not in record["validation"]["ids"]]
        assert record["test"]["accuracy"] == pytest.approx(sum(rights) / len(rights))

    def test_selection_goes_by_the_ratio_of_the_heads(self, call, heads, world):
        on_heads = ("--attention_heads", heads, "--top_heads", 2)
        limits = ("--thresholds", '{"single": {"1": 1}}')
        made = call(gen_chosen_rejected, "pairs", *on_heads, *limits, data="instructions")
        answers = {a["question_id"]: a["attention_ratio"] for a in lines(made / "answers.jsonl")}
        for a in lines(call(run_inference, "heads.jsonl", *on_heads)):
            if a["question_id"] in answers:
                assert answers[a["question_id"]] == pytest.approx(a["attention_ratio"], abs=1e-5)
        assert len(answers) == 40

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (None, "no such file"),
            ("", "not a file of heads"),
            ("{", "not a file of heads"),
            ("[1]", "a JSON object is due"),
            ('{"ranking": []}', "not a file of heads"),
            (ranking(), "the ranking is empty"),
            (ranking((9, 0)), "layer 9 head 0 does not exist: the language model has layers 0 to 3 of heads 0 to 3"),
            (ranking((2, 4)), "layer 2 head 4 does not exist"),
            (ranking((2, -1)), "not whole numbers"),
            (ranking(("two", 1)), "not whole numbers"),
            (ranking((2, 1)), "--top_heads 10: the file ranks 1 heads"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    @pytest.mark.parametrize("module", [run_inference, run_adaptive], ids=["run_inference", "run_adaptive"])
    def test_a_wrong_file_is_one_line(self, call, tmp_path, capsys, module, content, said):
        path = tmp_path / "wrong.json"
        if isinstance(content, Ranking):
            content.write(path)
        elif content is not None:
            path.write_text(content)
        with pytest.raises(SystemExit) as ended:
            call(module, "a.jsonl", "--attention_heads", path)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and said in error and "wrong.json" in error and error.count("\n") == 1

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"output": BASE / "heads.json"}, "lies in the checkpoint"),
            ({"output": ROOT}, "is a folder"),
            ({"layers": "7"}, "layers 0 to 3"),
            ({"data_path": "single.json"}, "nothing to tell apart"),
        ],
        ids=str,
    )
    def test_what_cannot_be_discovered_is_one_line(self, call, world, tmp_path, capsys, changes, said):
        singles = [r for r in json.loads((world / "test.json").read_text()) if r["image_type"] == "single"]
        (tmp_path / "single.json").write_text(json.dumps(singles))
        if "data_path" in changes:
            changes = {"data_path": tmp_path / "single.json"}
        with pytest.raises(SystemExit) as ended:
            call(discover_heads, "heads.json", **changes)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and said in error and error.count("\n") == 1
