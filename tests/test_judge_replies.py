"""What is read in a judge's reply, and the flags of the judge that do not fit together."""

import json
import time

import pytest

from inference.llava_hound_dpo.evaluate import main
from inference.llava_hound_dpo.llm_judge import parse_grades

FOUR = {"relevance": 5, "accuracy": 4, "clarity": 3, "completeness": 2}
GOOD = json.dumps(FOUR)
IN_TEXT = f"My {{grades}} are:\n{json.dumps(FOUR | {'reason': 'a {b} c'}, indent=1)}\nBye."


@pytest.mark.parametrize("reply", [GOOD, f"```json\n{GOOD}\n```", IN_TEXT, f'<think>{{"clarity": 1}}?</think>{GOOD}'])
def test_replies_that_can_be_read(reply):
    assert parse_grades(reply) == FOUR


NO_GRADE = [json.dumps(FOUR | {"clarity": value}) for value in (0, 6, -1, 3.0, "3", True, None, [3])]
UNREADABLE = [
    "",
    "5 4 3 2",
    "[5, 4, 3, 2]",
    GOOD + GOOD,
    GOOD[:-1],
    f'{{"grades": {GOOD}}}',
    GOOD.replace("clarity", "x"),
]


@pytest.mark.parametrize("reply", [*UNREADABLE, *NO_GRADE, '{"a":' * 5000], ids=lambda reply: reply[:75])
def test_replies_that_cannot_be_read(reply):
    assert parse_grades(reply) is None


LONG = ["{" * 10**6, '{"a":' * 10**5, "<think>" * 10**5, '{"' * 10**5, "{ " * 10**5 + '"', '{"a": ' + "1" * 10**6]


@pytest.mark.parametrize("reply", LONG, ids=lambda reply: reply[:8])
def test_long_replies_are_read_in_linear_time(reply):
    began = time.process_time()
    assert parse_grades(reply) is None
    assert time.process_time() - began < 5  # a few hundredths; by trying every brace, minutes


NAMED = ["--judge_model", "m", "--judge_url"]
BAD_URLS = ("h:80/v1", "ftp://h", "http://", "http://h:x", "http://me:pass@h", "http://h?key=pass")
BAD_FLAGS = [
    ("--judge_url needs --judge_model", ["--judge_url", "http://h/v1"]),
    ("give --judge_url too", NAMED[:2]),
    ("must be at least 1", [*NAMED, "http://h/v1", "--judge_workers", "0"]),
    ("--judge_pictures needs --questions", [*NAMED, "http://h/v1", "--judge_pictures", "x"]),
    *(("--judge_url must be like http://host:port/v1", [*NAMED, url]) for url in BAD_URLS),
]


@pytest.mark.parametrize(("message", "flags"), BAD_FLAGS)
def test_flags_that_do_not_fit(tmp_path, capsys, message, flags):
    with pytest.raises(SystemExit) as caught:
        main(["--answers", "a.jsonl", "--output", str(tmp_path / "out"), *flags])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1 and "pass" not in error
