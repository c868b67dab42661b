"""AdaptViz as a stage: its rule, its answers beside plain inference, its tuner; the mechanism is in test_scaling."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from inference.llava_hound_dpo import run_inference
from inference.llava_hound_dpo.evaluate import evaluate
from inference.llava_hound_dpo.findings import markdown
from inference.llava_hound_dpo.report import report
from inference_optimization.llava_hound_dpo import run_adaptive, tune
from inference_optimization.llava_hound_dpo.grid import ANOTHER, PLAIN, Variant, another_part, answer_grid
from inference_optimization.llava_hound_dpo.tune import Grid, best_bands, best_fixed, compare, describe
from llava.adaptviz import DEFAULTS, PRESETS, AdaptViz, Bands, read_config
from llava.answering import prepare
from llava.generation import PromptBatch, generate
from llava.regions import pointed_at
from llava.settings import AnswerSettings, ModelSettings
from tests.conftest import make_world
from tests.test_scaling import batch_of, prompts_of

ROOT = Path(__file__).parent.parent
BASE = ROOT / "scripts/miniature/base"


class TestRule:
    def factors(self, bands, *confidences):
        return bands.factor(torch.tensor(confidences)).tolist()

    def test_three_bands(self):
        bands = Bands(low=0.25, high=0.75, alpha_low=0.5, alpha_high=2.0)
        assert self.factors(bands, 0.0, 0.2, 0.25, 0.5, 0.7, 0.75, 1.0) == [0.5, 0.5, 1.0, 1.0, 1.0, 2.0, 2.0]

    def test_two_bands_leave_no_middle(self):
        assert self.factors(Bands(0.5, 0.5, 0.5, 2.0), 0.4, 0.5, 0.6) == [0.5, 2.0, 2.0]

    def test_one_factor(self):
        assert self.factors(Bands.fixed(1.5), 0.0, 0.5, 1.0) == [1.5, 1.5, 1.5]

    @pytest.mark.parametrize("numbers", [(0.6, 0.5, 1, 1), (-0.1, 0.5, 1, 1), (0.5, 1.1, 1, 1)], ids=str)
    def test_thresholds_out_of_order(self, numbers):
        with pytest.raises(ValueError, match=r"in order, from 0 to 1"):
            Bands(*numbers)

    @pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")], ids=str)
    def test_impossible_factors(self, factor):
        with pytest.raises(ValueError, match="above 0"):
            Bands(0.5, 0.5, 1.0, factor)

    def test_published_presets(self):
        """AdaptVis: weight 1 below the threshold, else weight 2; ScalingVis: one weight."""
        assert PRESETS["controlled_a"] == Bands(0.4, 0.4, 0.5, 1.5) and PRESETS["vg"] == Bands(0.2, 0.2, 0.5, 2.0)
        assert PRESETS["vsr"] == Bands(0.64, 0.64, 0.5, 1.2) and PRESETS["scaling_vg"] == Bands.fixed(2.0)

    def test_a_known_target_is_never_smoothed_by_default(self):
        for scope in ("target", "balance"):
            assert DEFAULTS[scope].alpha_low > 1 == DEFAULTS[scope].alpha_high
        assert DEFAULTS["all"].alpha_low < 1 < DEFAULTS["all"].alpha_high

    def test_single_pictures_are_left_alone(self):
        settings = AdaptViz(bands=Bands.fixed(2.0))
        pointed = ((1,), (0, 2), (0,), ())
        assert settings.factors([0.5] * 4, pointed).tolist() == [2.0, 2.0, 2.0, 1.0]
        everything = AdaptViz("all", bands=Bands.fixed(2.0))
        assert everything.factors([0.5] * 4, pointed).tolist() == [2.0] * 4

    def test_the_scale_is_on_the_region_and_on_no_text(self, model, family):
        batch = batch_of(family, prompts_of(model))
        is_image = batch.input_ids == model.config.image_token_id
        scales = {scope: AdaptViz(scope).steer(torch.full((3,), 0.1), batch) for scope in ("target", "all", "balance")}
        assert torch.equal(scales["target"].weights[:, 0], batch.regions[..., 0])
        assert torch.equal(scales["all"].weights[:, 0], is_image.float())
        assert not any(scale.weights[:, 0][~is_image].any() for scale in scales.values())
        assert [bool(scale.keeps_mass) for scale in scales.values()] == [False, False, True]
        assert all(torch.equal(scale.images, is_image) for scale in scales.values())


class TestGrid:
    """Many variants in one tree against one generation each."""

    VARIANTS = [PLAIN] + [
        Variant(*v) for v in (("target", "add", 3.0), ("all", "multiply", 0.5), ("balance", "multiply", 4.0))
    ]

    @pytest.mark.parametrize("steps", ["prefill", "all"])
    @pytest.mark.parametrize("kv_heads", [4, 2])
    def test_every_variant_answers_as_alone(self, processor, family, steps, kv_heads):
        from llava.attention import install
        from tests.conftest import tiny_model

        model = tiny_model(processor, num_key_value_heads=kv_heads)
        install(model)
        batch = batch_of(family, prompts_of(model, seed=4))
        confidence, texts = answer_grid(model, family, batch, self.VARIANTS, 6, steps == "all")
        for number, variant in enumerate(self.VARIANTS):
            settings = AdaptViz(variant.scope, variant.rule, steps, bands=Bands.fixed(variant.factor))
            alone = generate(model, family, batch, [1], settings.steer, max_new_tokens=6)
            assert [text[number] for text in texts] == [answer.text for answer in alone]
            assert confidence == pytest.approx([answer.confidence for answer in alone], abs=1e-6)
        assert len({tuple(text) for text in zip(*texts, strict=True)}) > 1

    @pytest.mark.parametrize(
        ("pointed", "wanted"),
        [((2,), 0), ((0,), 1), ((0, 1), 2), ((1, 2), 0), ((0, 2), 1), ((0, 1, 2), None), ((), None)],
    )
    def test_another_part_is_the_next_that_is_no_target_and_nothing_of_a_single_picture(self, pointed, wanted):
        eye = torch.eye(3).repeat_interleave(2, dim=0)  # three images of two tokens
        regions = torch.zeros(2, 6, 5)
        regions[0] = torch.cat([eye[:, list(pointed)].sum(dim=1, keepdim=True), torch.ones(6, 1), eye], dim=1)
        regions[1, :2] = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
        settings = {"regions": regions, "num_regions": (5, 3), "pointed": (pointed, (0,))}
        batch = PromptBatch(torch.zeros(2, 6), torch.ones(2, 6), torch.zeros(1, 2, 6), {}, **settings)
        first = [0.0] * 6 if wanted is None else eye[:, wanted].tolist()
        assert another_part(batch).tolist() == [first, [0] * 6]


class TestChoice:
    @pytest.fixture
    def grid(self):
        """Random scores of 60 questions; a factor of 2 is right for the unsure, 0.5 for nobody."""
        rng = np.random.default_rng(0)
        confidence = rng.random(60)
        scores = {Variant("target", "add", f): rng.integers(0, 2, 60).astype(float) for f in (0.5, 1.5)}
        scores[Variant("target", "add", 2.0)] = (confidence < 0.5).astype(float)
        scores[PLAIN] = rng.integers(0, 2, 60).astype(float)
        return Grid(np.array(["sequence", "pip", "single"] * 20), np.array([1, 1, 0] * 20, bool), confidence, scores)

    def value(self, grid, bands):
        return grid.weights @ grid.under(AdaptViz("target", "add", bands=bands))

    def test_bands_are_the_best_of_all_combinations(self, grid):
        factors = (1.0, 0.5, 1.5, 2.0)
        thresholds = [round(0.1 * n, 1) for n in range(11)]
        every = [
            Bands(low, high, a, b)
            for low, high in itertools.combinations_with_replacement(thresholds, 2)
            for a, b in itertools.product(factors, repeat=2)
        ]
        assert self.value(grid, best_bands(grid, "target", "add")) >= max(self.value(grid, bands) for bands in every)
        two = best_bands(grid, "target", "add", most_bands=2)
        best_two = max(self.value(grid, bands) for bands in every if bands.low == bands.high)
        assert two.low == two.high and self.value(grid, two) >= best_two

    def test_one_factor_is_the_best_of_all(self, grid):
        best = self.value(grid, best_fixed(grid, "target", "add"))
        assert best == max(self.value(grid, Bands.fixed(factor)) for factor in (1.0, 0.5, 1.5, 2.0))

    def test_nothing_is_scaled_where_scaling_changes_nothing(self, grid):
        same = dataclasses.replace(grid, scores={variant: grid.plain for variant in grid.scores})
        assert describe(best_bands(same, "target", "add")) == "1 always"

    def test_formats_count_the_same_and_single_pictures_nothing(self, grid):
        part = grid.part(np.arange(60) % 3 + np.arange(60) // 30 * 3 != 1)  # half of the pip questions
        for name in ("sequence", "pip"):
            assert part.weights[part.image_types == name].sum() == pytest.approx(0.5)
        assert not part.weights[part.image_types == "single"].any()

    def test_fixed_and_broken(self, grid):
        scores = grid.plain.copy()
        scores[:2] = 1 - scores[:2]
        row = compare(grid, scores)
        assert row["fixed"] + row["broken"] == 2
        assert row["difference"] == pytest.approx((row["fixed"] - row["broken"]) / 60)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, "--num_test", 60)
    return folder


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """Runs an entry point in this process on the miniature's questions and gives the answers it writes."""

    def run(module, name, *more):
        flags = {"model_name_or_path": BASE, "data_path": world / "test.json", "image_folder": world / "images"}
        flags |= {"output": tmp_path / name, "max_new_tokens": 6, "num_workers": 0, "batch_size": 16}
        words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [name, *words, *map(str, more)])
            module.main()
        path = tmp_path / name
        return [json.loads(line) for line in (path / "grid.jsonl" if path.is_dir() else path).read_text().splitlines()]

    return run


class TestAnswers:
    def test_factor_one_writes_the_file_of_plain_inference(self, run):
        plain = run(run_inference, "plain.jsonl")
        assert run(run_adaptive, "one.jsonl", "--alpha", 1) == plain

    def test_the_default_boosts_the_target_of_the_unsure(self, run):
        plain, steered = run(run_inference, "plain.jsonl"), run(run_adaptive, "steered.jsonl")
        low = DEFAULTS["target"]
        for a, b in zip(plain, steered, strict=True):
            unsure = b["confidence"] < low.low and b["image_type"] != "single"
            assert a["confidence"] == b["confidence"] and b["scale"] == (low.alpha_low if unsure else 1.0)
            assert unsure or a == b
        changed = [(a, b) for a, b in zip(plain, steered, strict=True) if b["scale"] != 1]
        assert len(changed) > 10
        assert np.mean([b["attention_ratio"] - a["attention_ratio"] for a, b in changed]) > 0.02

    def test_maps_are_those_of_the_steered_answer(self, run):
        answers = run(run_adaptive, "maps.jsonl", "--alpha", 8, "--rule", "add", "--steps", "all")
        mapped = [a for a in answers if "attention_map" in a and a["image_type"] == "sequence"]
        for a in mapped:
            total = [sum(map(sum, image["mass"])) for image in a["attention_map"]]
            assert [t / sum(total) for t in total] == pytest.approx(a["attention_by_image"], abs=5e-3)
        assert mapped and np.mean([a["attention_ratio"] for a in mapped]) > 0.9

    def test_settings_are_in_the_record_of_the_run(self, run, tmp_path):
        run(run_adaptive, "vg.jsonl", "--preset", "vg", "--scale_layers", "1-2")
        record = json.loads((tmp_path / "vg.run.json").read_text())["adaptviz"]
        assert record["scope"] == "all" and record["layers"] == [1, 2] and record["bands"]["alpha_high"] == 2.0
        assert AdaptViz.from_dict(record) == AdaptViz("all", layers=(1, 2), bands=PRESETS["vg"])

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--confidence_threshold_low", 0.8, "--confidence_threshold_high", 0.2], "in order"),
            (["--alpha_low", 0], "above 0"),
            (["--alpha", -1], "above 0"),
            (["--alpha", 2, "--alpha_low", 1.5], "do not go with it"),
            (["--preset", "vg", "--config", "c.json"], "give one of them"),
            (["--config", "missing.json"], "no such file"),
            (["--scale_layers", "9"], "layers 0 to 3"),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
    )
    def test_bad_settings_end_in_one_line(self, run, capsys, flags, said):
        with pytest.raises(SystemExit) as ended:
            run(run_adaptive, "bad.jsonl", *flags)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and said in error and error.count("\n") == 1

    def test_questions_that_refer_to_no_image_are_answered_plainly(self, run, capsys, world, tmp_path):
        records = json.loads((world / "test.json").read_text())
        several = [record for record in records if record["image_type"] == "sequence"]
        for record in several:
            record |= {"image_type": "multi"}
            del record["target"], record["target_box"]
        (tmp_path / "some.json").write_text(json.dumps(records))
        (tmp_path / "only.json").write_text(json.dumps(several))
        steered = run(run_adaptive, "some.jsonl", "--data_path", tmp_path / "some.json", "--alpha", 1.5)
        assert f"{len(several)} of 60 questions refer to no image ({several[0]['id']} first)" in capsys.readouterr().out
        scales = {kind: {a["scale"] for a in steered if a["image_type"] == kind} for kind in ("multi", "single", "pip")}
        assert scales == {"multi": {1.0}, "single": {1.0}, "pip": {1.5}}
        plain = {a["question_id"]: a for a in run(run_inference, "plain.jsonl", "--data_path", tmp_path / "some.json")}
        texts = [(a["text"], plain[a["question_id"]]["text"]) for a in steered if a["image_type"] == "multi"]
        assert all(one == other for one, other in texts)
        with pytest.raises(SystemExit) as ended:
            run(run_adaptive, "only.jsonl", "--data_path", tmp_path / "only.json")
        error = capsys.readouterr().err
        assert ended.value.code == 2 and "no image is referred to, nor in any other question" in error
        found = run(run_adaptive, "all.jsonl", "--data_path", tmp_path / "only.json", "--scope", "all", "--alpha", 1.5)
        assert {a["scale"] for a in found} == {1.5}

    def test_questions_that_look_for_their_image_are_answered_plainly(self, run, capsys, world, tmp_path):
        """Whoever is told where the answer lies has the answer; scope `all` tells nobody."""
        records = json.loads((world / "test.json").read_text())
        searches = [record for record in records if record["image_type"] in ("sequence", "collage")][::2]
        for record in searches:
            head = record["prompt"].rpartition("\n")[0]
            record |= {"prompt": f"{head}\nWhich image shows a ring?", "answer": "1", "is_search": True}
        (tmp_path / "some.json").write_text(json.dumps(records))
        flags, ids = ("--data_path", tmp_path / "some.json"), {record["id"] for record in searches}
        steered = run(run_adaptive, "some.jsonl", *flags, "--alpha", 1.5, "--scope", "balance")
        said = f"{len(ids)} of 60 questions look for an image, and where it is would be the answer ({searches[0]['id']}"
        assert said in (out := capsys.readouterr().out) and "refer to no image" not in out
        for line, own in zip(steered, run(run_inference, "plain.jsonl", *flags), strict=True):
            is_plain = line["question_id"] in ids or line["image_type"] == "single"
            assert line["scale"] == (1.0 if is_plain else 1.5) and (line == own) == is_plain
            assert line.get("is_search") == (True if line["question_id"] in ids else None)
        assert {a["scale"] for a in run(run_adaptive, "all.jsonl", *flags, "--alpha", 1.5, "--scope", "all")} == {1.5}
        # Scaled for every variant in the grid, and no more than plain for the choice.
        model = ModelSettings(model_name_or_path=str(BASE), image_folder=str(world / "images"))
        job = prepare(model, AnswerSettings(), str(flags[1]))
        texts = [{"confidence": 0.5, "texts": [question.answer, "no"]} for question in job.questions]
        grid = tune.scored("exact", job.questions, [PLAIN, Variant("target", "add", 2.0)], texts)
        is_plain = [bool(same) for same in grid.factors("target", "add")[2.0] == 1]
        assert is_plain == [not pointed_at(question) for question in job.questions] and sum(is_plain) > len(ids)


class TestTuner:
    def test_what_it_reports_is_what_the_chosen_settings_do(self, run, tmp_path):
        """The chosen settings, run as a user would, score on the test part what the tuner says of them."""
        run(tune, "tuned", "--share", 0.5)
        record = json.loads((tmp_path / "tuned" / "tuned.json").read_text())
        assert AdaptViz.from_dict(record["adaptviz"]) == read_config(tmp_path / "tuned" / "tuned.json")
        answers = run(run_adaptive, "chosen.jsonl", "--config", tmp_path / "tuned" / "tuned.json")
        chosen_on = set(record["validation"]["ids"])
        rights = [a["text"] == a["answer"] for a in answers if a["question_id"] not in chosen_on]
        assert record["test"]["questions"] == len(rights) == 30
        assert record["test"]["accuracy"] == pytest.approx(np.mean(rights))
        plain = run(run_inference, "plain.jsonl")
        rights = [a["text"] == a["answer"] for a in plain if a["question_id"] not in chosen_on]
        assert record["all"]["plain"]["test"]["accuracy"] == pytest.approx(np.mean(rights))
        assert "at another image" in (tmp_path / "tuned" / "table.md").read_text()

    def test_questions_that_were_tuned_on_are_marked_and_not_scored(self, run, tmp_path, world, capsys):
        """By what they ask, whatever their ids; a choice from a few is said to be a guess."""
        run(tune, "tuned", "--share", 0.5)
        assert "Chosen on 30 questions" in (said := capsys.readouterr().out) and "Fewer than 50 questions" in said
        record = json.loads((tmp_path / "tuned" / "tuned.json").read_text())
        assert record["is_guess"] and len(record["validation"]["digests"]) == 30
        records = json.loads((world / "test.json").read_text())
        tuned_on = {f"new {r['id']}" for r in records if r["id"] in record["validation"]["ids"]}
        (tmp_path / "new.json").write_text(json.dumps([r | {"id": f"new {r['id']}"} for r in records]))
        flags = ["--data_path", tmp_path / "new.json"]
        answers = run(run_adaptive, "steered.jsonl", "--config", tmp_path / "tuned" / "tuned.json", *flags)
        assert {a["question_id"] for a in answers if a.get("is_tuned_on")} == tuned_on and len(tuned_on) == 30
        assert "30 of 60 questions are those that" in (said := capsys.readouterr().out) and "a guess" in said
        run(run_inference, "plain.jsonl", *flags)
        files = [tmp_path / "steered.jsonl", tmp_path / "plain.jsonl"]
        scores, rows = evaluate(files, tmp_path / "new.json")
        assert set(scores["tuned_on"]) == tuned_on
        assert [own["overall"]["questions"] for own in scores["answers"].values()] == [30, 30]
        assert not tuned_on & {row.asked.id for own in rows.values() for row in own}
        assert "Left out of all scores: 30 questions, because the settings of AdaptViz" in markdown(scores)
        assert "Left out of all scores: 30 questions" in report(scores, rows)

    def test_only_what_has_a_right_answer_is_tuned_on(self, run, tmp_path, world, capsys):
        records = json.loads((world / "test.json").read_text())
        for record in records[:7]:
            del record["answer"]
        (tmp_path / "some.json").write_text(json.dumps(records))
        run(tune, "tuned", "--data_path", tmp_path / "some.json", "--factors", 1.5, "--scopes", "target")
        assert "7 of 60 questions have no right answer: left out" in capsys.readouterr().out
        record = json.loads((tmp_path / "tuned" / "tuned.json").read_text())
        assert record["validation"]["questions"] + record["test"]["questions"] == 53

    def test_the_grid_is_not_answered_twice(self, run, tmp_path, capsys):
        first = run(tune, "tuned")
        capsys.readouterr()
        assert run(tune, "tuned") == first and "nothing to do" in capsys.readouterr().out

    def test_the_paper_alone(self, run, tmp_path):
        run(tune, "paper", "--scopes", "all", "--rules", "multiply")
        names = set(json.loads((tmp_path / "paper" / "tuned.json").read_text())["all"])
        assert {"plain", "default all", "ScalingVis, tuned", "AdaptVis, tuned", "AdaptViz all multiply, tuned"} == names

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--share", 0], "above 0 and below 1"),
            (["--share", 0.001], "leaves 0"),
            (["--factors", 0], "above 0"),
            (["--temperature", 1], "greedily"),
            (["--per_format"], "one rule holds for all formats"),
        ],
        ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
    )
    def test_bad_flags_end_in_one_line(self, run, capsys, flags, said):
        with pytest.raises(SystemExit) as ended:
            run(tune, "bad", *flags)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "JSON|Expecting"), ('{"scope": "left"}', "none of target"), ('{"speed": 1}', "unknown setting 'speed'"),
     ('{"bands": {"low": 0.5}}', "bands need"), ('{"by_format": {"left": {"low": 0, "high": 0, "alpha_low": 1, '
      '"alpha_high": 1}}}', "are gone")],
)  # fmt: skip
def test_configs_that_cannot_be_read(tmp_path, content, said):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=said) as error:
        read_config(tmp_path / "c.json")
    assert "c.json" in str(error.value)


def test_scopes_of_the_grid_are_those_of_the_rule():
    assert ANOTHER not in DEFAULTS
