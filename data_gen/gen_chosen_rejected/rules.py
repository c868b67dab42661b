"""Which answers become rejected ones: a table of thresholds, an ordered table of reasons; every answer gets a verdict.

Source: the selection of MIA-DPO; the limits on length ratio and edit distance are named in its paper, without values.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data_gen.correctness import edit_distance, is_right, length_ratio, numbers_in
from llava.records import FORMATS, DataError, Question, check_answer, texts
from llava.regions import num_parts
from llava.scorers import true_choice, words
from llava.strict_json import loads

# Highest share of the image attention on the target at which a wrong answer is kept: format, pictures of the prompt.
THRESHOLDS = {
    "sequence": {2: 0.8, 3: 0.7, 4: 0.6, 5: 0.6},
    "collage": {2: 0.7, 3: 0.6, 4: 0.5, 6: 0.4, 9: 0.3},
    "pip": {2: 0.8},
}
INCLUSIVE = {"sequence"}  # formats in which the threshold itself is kept too


@dataclass(frozen=True)
class Rules:
    """The limits of a run."""

    thresholds: dict[str, dict[int, float]]
    min_perplexity: float = 1.1  # of the model's own answer; kept above it
    max_chosen_chars: int = 512  # the true answer is shorter
    max_length_ratio: float = 3.0  # words of the longer answer per word of the shorter
    min_edit_distance: float = 0.1  # share of the characters of the longer answer


@dataclass(frozen=True)
class Candidate:
    """An answer that may become the rejected one of a pair."""

    question: Question
    text: str
    rejected_from: str  # clean, noise_target_225, ..., hidden, other_image, repointed
    is_complete: bool = True  # it ended by itself
    attention_ratio: float | None = None  # None where no model was asked, or the target was hidden from it
    perplexity: float | None = None
    others: tuple[str, ...] = ()  # what is true of the other images, as far as that is known


Numbers = dict[str, Any]  # what decided


def unfit(question: Question, rules: Rules) -> tuple[str, Numbers] | None:
    """(reason, what decided) why no pair is made of a question, whatever its answer; None if one may be."""
    if not question.targets:
        return "refusal", {}  # there is no image to look at
    length = len(question.answer)
    return ("long true answer", {"chars": length}) if length >= rules.max_chosen_chars else None


def judge(candidate: Candidate, rules: Rules) -> tuple[str, Numbers] | None:
    """(reason, what decided) why an answer is not rejected, by the first of CHECKS that says so; None: it is kept."""
    for reason, check in CHECKS.items():
        numbers = check(candidate, rules)
        if numbers is not None:
            return reason, numbers
    return None


def _if(applies: bool | None, **numbers: float | None) -> Numbers | None:
    return numbers if applies else None


def _special_text(candidate: Candidate, rules: Rules) -> Numbers | None:
    try:
        check_answer(candidate.text)
    except ValueError as error:
        return {"problem": str(error)}
    return None


def says_the_answer(question: Question, text: str) -> bool | None:
    """`is_right` of a text: in order where several images are named; of one that is sought by its number.

    None, as it may be right in other words, where one is sought and no number is said.
    """
    if question.is_search and (true := numbers_in(question.answer)):
        given = numbers_in(text)
        return bool(given & true) if given else None
    return is_right(text, question.answer, texts(question.extra, "choices") or (), in_order=compares(question))


def compares(question: Question) -> bool:
    """Whether a prompt names several images, whose truths its answer says in turn."""
    return len(question.targets) > 1 and not question.is_search


def _is_right(candidate: Candidate) -> bool | None:
    return says_the_answer(candidate.question, candidate.text)


def _sure(candidate: Candidate, rules: Rules) -> Numbers | None:
    perplexity = candidate.perplexity
    return _if(perplexity is not None and not perplexity > rules.min_perplexity, perplexity=perplexity)


def _on_target(candidate: Candidate, rules: Rules) -> Numbers | None:
    question, ratio = candidate.question, candidate.attention_ratio
    if ratio is None:
        return None
    number, threshold = len(question.targets), rules.thresholds[question.image_type][num_pictures(question)]
    if number == num_pictures(question):
        return None  # there is nowhere else to look
    if number > 1:
        threshold = 1 - (1 - threshold) ** number  # each leaves as much as one does of what those before it left
    is_kept = ratio < threshold or (ratio == threshold and question.image_type in INCLUSIVE)
    return _if(not is_kept, attention_ratio=ratio, threshold=threshold)


def _length(candidate: Candidate, rules: Rules) -> Numbers | None:
    ratio = length_ratio(candidate.text, candidate.question.answer)
    return _if(ratio > rules.max_length_ratio, length_ratio=ratio)


def _near_copy(candidate: Candidate, rules: Rules) -> Numbers | None:
    distance = edit_distance(candidate.text, candidate.question.answer)
    return _if(distance < rules.min_edit_distance, edit_distance=distance)


CHECKS: dict[str, Callable[[Candidate, Rules], Numbers | None]] = {
    "empty": lambda candidate, _: _if(not words(candidate.text)),
    "cut off": lambda candidate, _: _if(not candidate.is_complete),
    "special text": _special_text,
    "undecided": lambda candidate, _: _if(_is_right(candidate) is None),
    "right": lambda candidate, _: _if(_is_right(candidate)),
    "sure": _sure,
    "on target": _on_target,
    "length": _length,
    "near copy": _near_copy,
}


def num_pictures(question: Question) -> int:
    """Pictures that a prompt shows: images of a sequence, cells of a collage, two of a picture in a picture."""
    if question.image_type == "collage" and question.grid is None:
        raise ValueError("a collage needs its `grid` [rows, cols]: the threshold depends on the number of cells")
    return num_parts(question, ())


def check_questions(questions: Sequence[Question], rules: Rules, by_attention: bool) -> None:
    """Raise DataError for questions that no verdict can be given on, before any model is asked."""
    problems = []
    for question in questions:
        try:
            _check(question, rules, by_attention)
        except ValueError as error:
            problems.append(f"{question.where}: {error}")
    if problems:
        raise DataError(problems)


def _check(question: Question, rules: Rules, by_attention: bool) -> None:
    number = num_pictures(question)
    if not question.targets:
        return
    if choices := texts(question.extra, "choices"):
        true_choice(question.answer, choices)
    if by_attention and number not in rules.thresholds.get(question.image_type, {}):
        example = json.dumps({question.image_type: {str(number): 0.5}})
        raise ValueError(
            f"there is no attention threshold for {question.image_type} of {number}: leave the record out, or give one "
            f"with --thresholds '{example}'"
        )


def read_thresholds(text: str | None) -> dict[str, dict[int, float]]:
    """The table with changes as `{"sequence": {"2": 0.75}}`. Raises ValueError."""
    table = {image_type: dict(by_number) for image_type, by_number in THRESHOLDS.items()}
    try:
        for image_type, by_number in loads(text or "{}").items():
            changes = {int(number): float(value) for number, value in by_number.items()}
            table[FORMATS[FORMATS.index(image_type)]] = table.get(image_type, {}) | changes
    except (AttributeError, TypeError, ValueError) as error:
        example = '{"sequence": {"2": 0.75}, "pip": {"2": 0.8}}'
        raise ValueError(f"--thresholds {text!r}: write changes of {', '.join(THRESHOLDS)} as {example}") from error
    if not all(0 <= value <= 1 for by_number in table.values() for value in by_number.values()):
        raise ValueError(f"--thresholds {text!r}: a threshold is a share of attention, from 0 to 1")
    return table
