"""What is true of the other images of a prompt; wrong answers: a model's, and those made of it without any model."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_gen.drops import Unusable
from data_gen.gen_chosen_rejected.noise import HIDDEN, Noise
from data_gen.gen_chosen_rejected.rules import Candidate, compares, num_pictures, says_the_answer
from data_gen.sources import parse_source, rng_of, source_paths
from data_gen.tables import Table
from llava.asked import TARGET
from llava.records import IMAGE, Question, texts
from llava.words import words

logger = logging.getLogger(__name__)
Answers = dict[str, dict[str, str]]  # path of a source picture: question in small letters: answer


@dataclass(frozen=True)
class Truth:
    """What is true of another image of a prompt."""

    text: str
    position: int | None  # 0-based; None where only the answer is known


def read_source_answers(paths: Iterable[str], questions: Sequence[Question]) -> Answers:
    """Every answer that the sources have about pictures of the prompts. Raises ValueError, FileNotFoundError."""
    wanted = {path for question in questions for path in source_paths(question.extra)}
    answers: Answers = {path: {} for path in wanted}
    for path in paths:
        table = Table(path)
        for number, raw in enumerate(table.rows(), 1):
            try:
                source = parse_source(raw, table.path, number)
            except Unusable:  # listed in dropped.jsonl of the instructions, where none of them can be asked about
                continue
            if source.path in wanted:
                for question, answer in source.turns:
                    answers[source.path].setdefault(question.casefold(), answer)
    return answers


def truths(question: Question, answers: Answers) -> list[Truth]:
    """What is known of the other images: from the record's `others`, else from the sources' same question.

    Of prompts about several images, or that look for one, only from `others`, which are of no single image.
    """
    places = [place for place in range(num_pictures(question)) if place not in question.targets]
    if others := texts(question.extra, "others"):
        has_places = len(others) == len(places) and asks_about_one(question)
        return [Truth(text, places[number] if has_places else None) for number, text in enumerate(others)]
    paths, asked = source_paths(question.extra), bare_question(question.prompt).casefold()
    if len(paths) != len(places) + 1 or not asks_about_one(question):
        return []
    found = [(place, answers.get(paths[place], {}).get(asked)) for place in places]
    return [Truth(text, place) for place, text in found if text is not None]


def asks_about_one(question: Question) -> bool:
    """Whether a prompt names one image, as level 1 does."""
    return len(question.targets) == 1 and not question.is_search


def bare_question(prompt: str) -> str:
    """The question of a prompt without images and without the words that say which one is meant."""
    text = prompt.rsplit(IMAGE, 1)[-1].lstrip("\n")
    named = TARGET.match(text)
    return text[named.end() if named else 0 :].partition(", ")[2]


def modelled(question: Question, given: dict[str, Any], noise: Noise, known: Answers) -> Candidate:
    """What a model answered, a line of its answers.jsonl."""
    ratio = None if noise.kind == HIDDEN else given["attention_ratio"]  # 0 whatever the answer
    return Candidate(
        question, given["text"], noise.name(question), given["is_complete"], ratio, given["perplexity"],
        tuple(truth.text for truth in truths(question, known)),
    )  # fmt: skip


def other_image(question: Question, known: Sequence[Truth], seed: int) -> Candidate | None:
    """What is true of another image, if possible not of this one too; None if nothing is known of the others.

    Of two images that are compared: as often what is true of them in the other order as what is true of other pairs.
    """
    if not known:
        return None
    wrong = [truth.text for truth in known if not says_the_answer(question, truth.text)]
    pool, kind, rng = wrong or [truth.text for truth in known], "other_image", rng_of(seed, question.id)
    if question.is_search:
        kind = "other_number"
    elif compares(question):
        swapped = [text for text in pool if sorted(words(text)) == sorted(words(question.answer))]
        pairs = [text for text in pool if text not in swapped]
        is_swapped = bool(swapped) and (not pairs or rng.random() < 0.5)
        pool, kind = (swapped, "swapped") if is_swapped else (pairs, "other_pair")
    return Candidate(question, pool[rng.integers(len(pool))], kind, others=tuple(truth.text for truth in known))


def repointed(question: Question, known: Sequence[Truth]) -> list[Candidate]:
    """The same images asked about in another place: what is true there, against what was true of the first place.

    Only places with numbers can be pointed at: pictures in pictures give none, nor do prompts about several images.
    """
    if question.image_type == "pip" or not asks_about_one(question):
        return []
    dropped = {"others", "is_refusal"}
    extra = {name: value for name, value in question.extra.items() if name not in dropped}
    made = []
    for truth in known:
        if truth.position is None:
            continue
        moved = replace(
            question,
            id=f"{question.id}_to_image{truth.position + 1}",
            prompt=TARGET.sub(f"In Image{truth.position + 1}", question.prompt, count=1),
            targets=(truth.position,),
            target_box=None,  # known of the first place only; a collage's cell follows from its grid
            answer=truth.text,
            extra=extra | {"repointed_from": question.id},
        )
        made.append(Candidate(moved, question.answer, "repointed", others=(question.answer,)))
    return made
