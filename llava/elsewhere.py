"""Answers from elsewhere: asked of an OpenAI-compatible server, or read from a file; and how a model here sees them."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llava.answering import Answers, Job, identify, record
from llava.command_line import check_numbers, flag
from llava.endpoint import KEY_VARIABLE, Endpoint, Failed, Words, ask_all, messages_of, url_part
from llava.families import Family
from llava.generation import Generated
from llava.measuring import measure
from llava.records import DataError, Question, read_records
from llava.run_folder import read_object
from llava.runtime import user_errors
from llava.settings import AnswerSettings

SERVER = Words("the server", "--endpoint", "--endpoint_model", "--endpoint_key_env")
GREEDY = {"top_p": 1.0, "repetition_penalty": 1.0}  # whatever the folder's generation_config says, as here


# ---- asked of a server


@dataclass(kw_only=True)
class ServerSettings:
    """A server that answers in place of the model, greedily; its attention is not seen (see the command `measure`)."""

    _argument_group_name = "server"

    endpoint: str | None = flag("URL of an OpenAI-compatible server that answers, as http://localhost:8000/v1", None)
    endpoint_model: str | None = flag("its name for the model; default: the path of the model here", None)
    endpoint_key_env: str = flag("environment variable with its key, if it wants one", KEY_VARIABLE)
    endpoint_workers: int = flag("requests at a time", 16)

    def __post_init__(self):
        check_numbers(self, endpoint_workers=(1, 1000))

    def open(self, model: str, settings: AnswerSettings) -> Endpoint | None:
        """The server's `model`; None without --endpoint. Raises ValueError."""
        if self.endpoint is None:
            return None
        if settings.temperature > 0 or settings.num_beams > 1:
            raise ValueError("--endpoint answers greedily: drop --temperature and --num_beams")
        name, key, length = self.endpoint_model or model, self.endpoint_key_env, settings.max_new_tokens
        return Endpoint(self.endpoint, name, key, SERVER, _greedy(Path(model)), max_tokens=length)


def _greedy(folder: Path) -> dict[str, Any]:
    """What a server is asked for; of a folder that penalises repetition also as `transformers serve` takes it."""
    file = folder / "generation_config.json"
    settings = read_object(file) if file.is_file() else {}
    if settings.get("repetition_penalty") in (None, 1.0):
        return GREEDY
    return GREEDY | {"generation_config": json.dumps(settings | GREEDY | {"do_sample": False})}


Said = tuple[str, list[int], bool]  # an answer's text, its token ids, whether it ended by itself


def ask_server(
    endpoint: Endpoint, job: Job, numbers: Sequence[int], workers: int, keep: Callable[[int, Said], None]
) -> None:
    """Ask the questions of these numbers, pictures as PNG in the message, and `keep` each number with what was said.

    Questions without a reply are logged and left out. Raises EndpointError.
    """

    def messages(question: Question) -> list[dict[str, Any]]:
        pictures = [job.store.open(name) for name in question.images]
        shown = job.alter(question, pictures) if job.alter else pictures
        turns = [*question.context, ("user", question.prompt)]
        return messages_of(turns, shown, lambda picture: url_part(picture, "png"))

    async def ask(number: int) -> Said:
        question = job.questions[number]
        text, is_complete = await endpoint.reply(await asyncio.to_thread(messages, question), question.where)
        text = job.family.without_specials(text).strip()
        try:
            return text, tokens_of(job.family, question, text, is_complete), is_complete
        except ValueError as error:
            raise Failed(
                f"{question.where}: {endpoint.words.name} gave an answer that cannot be read ({error})"
            ) from error

    asyncio.run(ask_all(endpoint, numbers, ask, keep, workers))


def tokens_of(family: Family, question: Question, text: str, is_complete: bool) -> list[int]:
    """Token ids of an answer's text, without the end token where it was cut off. Raises ValueError."""
    tokens = family.encode_answer(question.prompt, text, question.context)
    return tokens if is_complete or len(tokens) == 1 else tokens[:-1]


def answer_by_server(job: Job, endpoint: Endpoint, workers: int, output: Path, **identity: Any) -> None:
    """Like `answer`, by a server: the same records and going on, with null for what is measured of a model here."""
    job = replace(
        job, layers=[], heads=None, mapped=frozenset(), batches=[[n] for batch in job.batches for n in batch],
        settings=replace(job.settings, attention_layers="none", attention_heads=None, attention_maps=0),
    )  # fmt: skip
    with user_errors():
        identity = identify(job) | {"served_model": endpoint.model} | identity
    answers = Answers(job, output, identity)
    missing = dict.fromkeys(number for batch in answers.left for number in job.batches[batch])

    def keep(number: int, said: Said) -> None:
        unmeasured = Generated(*said, confidence=None, perplexity=None, factor=1.0, masses=torch.zeros(0, 2))
        answers.append([record(job, number, unmeasured)])
        del missing[number]

    try:
        if missing:
            ask_server(endpoint, job, list(missing), workers, keep)
    except (ValueError, OSError) as error:
        answers.stop(str(error))
    if missing:
        first = job.questions[next(iter(missing))].where
        answers.stop(f"{endpoint.url}: no answer to {len(missing)} questions, {first} first: start the command again")
    answers.finish()


# ---- given in a file


@dataclass(frozen=True)
class Given:
    """An answer of whomever to a question; a question may have several."""

    where: str
    question_id: str
    text: str
    is_complete: bool
    extra: dict[str, Any]  # all other fields


def read_given(path: str | Path) -> list[Given]:
    """Answers in JSON lines of `question_id`, `text` and perhaps `is_complete`. Raises DataError, FileNotFoundError."""
    return read_records(path, _parse_given)


def _parse_given(raw: Any, where: str) -> Given:
    given = dict(raw) if isinstance(raw, dict) else {}
    id, text, is_complete = given.pop("question_id", None), given.pop("text", None), given.pop("is_complete", True)
    if not isinstance(id, str | int) or not isinstance(text, str) or not isinstance(is_complete, bool):
        raise ValueError("an answer has a `question_id`, a `text`, and where it was cut off `is_complete` false")
    return Given(where, str(id), text.strip(), is_complete, given)


def answered(questions: Sequence[Question], answers: Sequence[Given]) -> list[Question]:
    """The questions that have an answer. Raises DataError for answers to none of them."""
    known, asked = {question.id for question in questions}, {given.question_id for given in answers}
    problems = [f"{given.where}: no question has this id" for given in answers if given.question_id not in known]
    if problems:
        raise DataError(problems)
    return [question for question in questions if question.id in asked]


def with_answers(job: Job, answers: Sequence[Given]) -> Job:
    """The job of looking at answers: a question for each of them, a batch those of one prompt.

    Where a question has several, each gets its place among them (`sample`, from 0) unless it has one already. Raises
    DataError for texts that cannot be read as an answer.
    """
    asked = {question.id: number for number, question in enumerate(job.questions)}
    own: dict[int, list[int]] = {number: [] for batch in job.batches for number in batch}  # longest prompts first
    several = Counter(given.question_id for given in answers)
    questions, said, problems = [], [], []
    for number, given in enumerate(answers):
        question, others = job.questions[asked[given.question_id]], own[asked[given.question_id]]
        place = {"sample": len(others)} if several[question.id] > 1 else {}
        questions.append(replace(question, extra=question.extra | place | given.extra))
        others.append(number)
        try:
            said.append((given.text, tokens_of(job.family, question, given.text, given.is_complete)))
        except ValueError as error:
            problems.append(f"{given.where}: {error}")
    if problems:
        raise DataError(problems)
    size, numbers = job.model.batch_size, [asked[given.question_id] for given in answers]
    return replace(
        job,
        questions=questions,
        prompts=[job.prompts[number] for number in numbers],
        lengths=[job.lengths[number] for number in numbers],
        batches=[group[n : n + size] for group in own.values() for n in range(0, len(group), size)],
        mapped=frozenset(own[number][0] for number in job.mapped),
        given=said,
        settings=replace(job.settings, max_new_tokens=max(len(tokens) for _, tokens in said)),
    )


def measure_answers(job: Job, output: Path, identity: dict[str, Any]) -> None:
    """Write answers.jsonl with what a model here notes on every given answer, going on where a killed run was."""
    answers = Answers(job, output, identity)
    for model, numbers, batch in answers:
        said = [job.given[number] for number in numbers]
        found = measure(model, job.family, batch, [tokens for _, tokens in said], job.layers, job.selected)
        kept = [replace(own, text=text) for own, (text, _) in zip(found, said, strict=True)]
        answers.append([record(job, number, own) for number, own in zip(numbers, kept, strict=True)])
    answers.finish()
