"""Multiple choice judged by the rules of two public harnesses, so that a score can stand beside published ones.

They are not how an answer should be read (`scorers.parse_choice` is; tests/test_scorers.py has both on the same
answers), they are how published numbers were made. Where the public rule draws an option at random, nothing is drawn
here: the answer is UNPARSED, is counted as such, and scores what the draw is worth on average, 1 / number of options.
"""

import re
from collections.abc import Callable, Sequence

from llava.scorers import RIGHT, UNPARSED, WRONG, Result, true_choice

DRAWS_AT_RANDOM = {"lmms_eval"}
_REFUSALS = (  # VLMEvalKit's list: answers with one of these are no option, whatever else they say
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def score_compatible(scorer: str, text: str, answer: str, choices: Sequence[str]) -> Result:
    """Judge a multiple-choice answer by the rule of another harness; `scorer` is a name in COMPATIBLE.

    Raises ValueError where the true answer is none of the options.
    """
    true, given = true_choice(answer, choices), COMPATIBLE[scorer](text, choices)
    if given is None:
        return Result(1 / len(choices) if scorer in DRAWS_AT_RANDOM else 0.0, UNPARSED)
    return Result(float(given == true), RIGHT if given == true else WRONG)


def lmms_eval(text: str, options: Sequence[str]) -> int | None:
    """0-based option by the rule of MMMU, which lmms-eval also uses for Q-Bench2; None where it draws at random.

    The first of these that finds an option counts, and of several the last in the text: "(A)", "A " (also at the end
    of a word), "A.", then, in answers of more than five words, the text of an option anywhere.
    Source: EvolvingLMMs-Lab/lmms-eval:lmms_eval/tasks/_task_utils/mmmu_mcq_utils.py
    (`parse_mmmu_multi_choice_response`), the same in tasks/qbench/utils.py.
    """
    for mark in ",.!?;:'":  # one after the other, as there: what a later mark uncovers stays
        text = text.strip(mark)
    text = f" {text} "
    for found, placed in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        letters = [n for n in range(len(options)) if found.format(_letter(n)) in text]
        if letters:
            return max(letters, key=lambda n: text.rfind(placed.format(_letter(n))))
    spoken = text.lower()
    mentioned = [n for n, option in enumerate(options) if option.lower() in spoken] if len(text.split()) > 5 else []
    return max(mentioned, key=lambda n: spoken.rfind(options[n].lower()), default=None)


def lmms_eval_blink(text: str, options: Sequence[str]) -> int | None:
    """0-based option by lmms-eval's rule for BLINK: the first letter of the answer, of whatever word it is.

    None where that letter is no option's ("The answer is B" gives T), which scores 0 there too.
    Source: EvolvingLMMs-Lab/lmms-eval:lmms_eval/tasks/blink/utils.py (`_extract_answer_letter`).
    """
    match = re.match(r"[(\s]*([A-Z])", text.strip(), re.I)
    return _number(match[1].upper(), options) if match else None


def lmms_eval_muirbench(text: str, options: Sequence[str]) -> int | None:
    """0-based option by lmms-eval's rule for MuirBench: "A." at the start, or nothing but the letter; else None.

    Source: EvolvingLMMs-Lab/lmms-eval:lmms_eval/tasks/muirbench/utils.py (`MultiChoiceRegexFilter`, then
    `muir_aggregation`).
    """
    match = re.match(r"\s*([A-Z])\.", text)
    return _number((match[1] if match else text.strip()).upper(), options)


def vlmevalkit(text: str, options: Sequence[str]) -> int | None:
    """0-based option by VLMEvalKit's rule without a judge model; None where it finds none, which scores 0 there.

    The one letter that stands alone among the words, if it is among the last five (punctuation is dropped, so "A" of
    "A car" is a letter); else the letter right after "answer is" (also where it only begins a word: "answer is blue"
    is B); else the one option whose text is part of the answer, if the answer is not much longer than all options.
    Source: open-compass/VLMEvalKit:vlmeval/utils/matching_util.py (`can_infer`, and of it `can_infer_option` and
    `can_infer_text`; with VERBOSE unset).
    """
    if "Failed to obtain answer via API" in text:
        return _option_within(text, options)
    if any(refusal in text for refusal in _REFUSALS):
        return None
    tokens = text.translate(str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))).split()
    letters = [n for n in range(len(options)) if _letter(n) in tokens]
    if len(letters) == 1 and tokens.index(_letter(letters[0])) > len(tokens) - 5:
        return letters[0]
    if not letters and "Z" in tokens:
        return None
    match = re.search(r"answer\s+is\s+\**([ABCD])", text, re.I)
    number = _number(match[1].upper(), options) if match else None
    return _option_within(text, options) if number is None else number


COMPATIBLE: dict[str, Callable[[str, Sequence[str]], int | None]] = {
    "lmms_eval": lmms_eval,
    "lmms_eval_blink": lmms_eval_blink,
    "lmms_eval_muirbench": lmms_eval_muirbench,
    "vlmevalkit": vlmevalkit,
}


def _option_within(text: str, options: Sequence[str]) -> int | None:
    """The one option whose text is a part of the answer, also of one of its words."""
    text = text.lower()
    if len(text) > 2 * sum(map(len, options)):
        return None
    within = [number for number, option in enumerate(options) if option.lower() in text]
    return within[0] if len(within) == 1 else None


def _letter(number: int) -> str:
    return chr(ord("A") + number)


def _number(letter: str, options: Sequence[str]) -> int | None:
    number = ord(letter) - ord("A") if len(letter) == 1 else -1
    return number if 0 <= number < len(options) else None
