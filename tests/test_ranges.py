"""Numbers of the answering commands that mean nothing are refused by name, before anything is read."""

import pytest

from data_gen.gen_chosen_rejected import __main__ as pairs
from data_gen.gen_instruction import __main__ as generate
from data_gen.gen_instruction import test_set
from data_gen.mix import __main__ as mix
from inference.llava_hound_dpo.evaluate import Evaluation, JudgeFlags
from inference_optimization.llava_hound_dpo.tune import TuneSettings
from llava.adaptviz import Bands
from llava.command_line import parse
from llava.settings import AnswerSettings, ModelSettings
from scripts.discover_heads import DiscoverSettings
from scripts.draw_attention import DrawSettings

MODEL = ["--model_name_or_path", "m", "--image_folder", "i"]
FILES = ["--data_path", "d", "--output", "o"]
NOT_FINITE = ["nan", "inf", "-inf"]
BAD = [
    (ModelSettings, MODEL, {
        "batch_size": ["0", "-1"], "num_workers": ["-1", "1000000000"], "max_image_tokens": ["0", "-1"],
    }),
    (AnswerSettings, [], {
        "max_new_tokens": ["0", "-5"], "temperature": [*NOT_FINITE, "-1"], "top_p": [*NOT_FINITE, "0", "1.5", "-1"],
        "num_beams": ["0"], "seed": ["-1", "99999999999999999999"], "top_heads": ["0", "-1"], "attention_maps": ["-1"],
    }),
    (TuneSettings, FILES, {"share": [*NOT_FINITE, "0", "1", "-1"], "factors": [*NOT_FINITE, "0", "-2"]}),
    (DiscoverSettings, FILES, {"limit": ["0", "-1"]}),
    (DrawSettings, FILES, {"limit": ["0"], "height": ["0", "-1", "1000000"]}),
]  # fmt: skip
CASES = [(group, words, name, value) for group, words, own in BAD for name, values in own.items() for value in values]


@pytest.mark.parametrize(("group", "words", "name", "value"), CASES, ids=str)
def test_numbers_out_of_range(group, words, name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"--{name}\b"):
        parse((group,), None, [*words, f"--{name}={value}"])


@pytest.mark.parametrize("name", ["alpha_low", "alpha_middle", "alpha_high", "low", "high"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_bands(name, value):
    with pytest.raises(ValueError, match=r"a factor must be above 0|must be in order, from 0 to 1"):
        Bands(**{"low": 0.5, "high": 0.5, "alpha_low": 1.0, "alpha_high": 1.0, name: value})


@pytest.mark.parametrize("value", ["0", "-1", "1000000000"])
def test_requests_at_a_time(value, tmp_path):
    flags = ["--answers", "a", "--output", str(tmp_path / "o"), "--judge_url", "http://h/v1", "--judge_model", "m"]
    settings, judge = parse((Evaluation, JudgeFlags), None, [*flags, "--judge_workers", value])
    with pytest.raises(ValueError, match="--judge_workers"):
        judge.judge(settings)


def test_all_numbers_of_these_commands_are_in_the_table():
    """A new number needs its range here."""
    free = {"split_seed", "max_new_tokens", "top_heads"}  # any whole number; the same as of answering
    for group, _, own in BAD:
        numbers = {n for n, f in group.__dataclass_fields__.items() if f.type in (int, float, list[float], int | None)}
        assert numbers <= set(own) | free, group


STAGES = {  # of data_gen: what runs, its flags, and numbers that mean nothing
    "instructions": (generate.main, ["--source", "s", "--output", "o", "--format", "sequence"], {
        "refusals": [*NOT_FINITE, "-1", "2"], "seed": ["-1"], "num_records": ["0", "-1", "100000000000000"],
        "num_workers": ["-1", "1000000000"],
    }),
    "test set": (test_set.main, ["--source", "s", "--output", "o"], {
        "num_per_format": ["0", "-3", "100000000000000"], "seed": ["-1"], "num_workers": ["-1"],
    }),
    "pairs": (pairs.main, ["--instructions", "i", "--output", "o", "--image_folder", "i"], {
        "seed": ["-1"], "max_new_tokens": ["0"], "noise_std": [*NOT_FINITE, "0", "-1"],
        "min_perplexity": [*NOT_FINITE, "-1"], "max_chosen_chars": ["0", "-1"], "max_length_ratio": [*NOT_FINITE, "0"],
        "min_edit_distance": [*NOT_FINITE, "-1", "1", "2"], "top_heads": ["0"], "batch_size": ["0"],
    }),
    "mix": (mix.main, ["--pairs", "p", "--image_folder", "i", "--output", "o"], {
        "validation": [*NOT_FINITE, "-1", "1", "2"], "seed": ["-1"],
    }),
}  # fmt: skip
STAGE_CASES = [
    (stage, name, value) for stage, (*_, own) in STAGES.items() for name, values in own.items() for value in values
]


@pytest.mark.parametrize(("stage", "name", "value"), STAGE_CASES, ids=str)
def test_numbers_of_data_that_mean_nothing(stage, name, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, words, _ = STAGES[stage]
    monkeypatch.setattr("sys.argv", ["command", *words, f"--{name}={value}"])
    with pytest.raises(SystemExit) as ended:
        run()
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and f"--{name}" in lines[0], lines
    assert not list(tmp_path.iterdir())
