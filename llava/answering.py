"""Answering a whole test set: what plain inference, AdaptViz, data selection and the tools share.

Batches are fixed by the test set alone (sorted by length), so that one process, several, and a run that was killed and
started again all compute the same numbers.
"""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from llava.answers import AnswerStore
from llava.asked import in_digests, target_fields
from llava.attention import layer_range
from llava.checkpoints import Checkpoint
from llava.checks import check_pictures
from llava.families import Family
from llava.generation import Generated, PromptBatch, Steer, batch_prompts, generate
from llava.heads import Heads, select_heads
from llava.heatmap import attention_map
from llava.image import ImageStore, Pictures
from llava.machine import announce, own_device, require_usable
from llava.merging import merge
from llava.records import Question, messages, read_questions, refuse_duplicates
from llava.regions import collage_grid, pointed_at, prompt_regions
from llava.run_folder import only_writer
from llava.runtime import Progress, is_main_process, stop, user_errors
from llava.settings import AnswerSettings, ModelSettings

logger = logging.getLogger(__name__)

# Flags that do not change the answers.
PROCESS_FLAGS = {"output", "num_workers", "check_images"}


@dataclass(frozen=True)
class Job:
    """Everything checked and ready before the weights are loaded."""

    model: ModelSettings
    settings: AnswerSettings
    checkpoint: Checkpoint
    questions: list[Question]
    prompts: list[list[int]]  # token ids, one image token per picture
    batches: list[list[int]]  # question numbers, longest prompts first
    store: Pictures
    layers: list[int]  # those whose attention is measured
    mapped: frozenset[int]  # questions whose attention map is kept
    alter: Callable[[Question, list[Image.Image]], list[Image.Image]] | None = None  # what is shown for the pictures
    hides_target: bool = False  # as of `PromptBatch.without_target`
    heads: Heads | None = None  # those of `layers` whose attention is measured; None: all
    lengths: Sequence[int] = ()  # tokens of each expanded prompt
    # (text, token ids) of answers that are given, one for each question; a batch is then of one prompt.
    given: Sequence[tuple[str, list[int]]] = ()

    @property
    def family(self) -> Family:
        """The checkpoint's."""
        return self.checkpoint.family

    @property
    def context(self) -> int:
        """Tokens of prompt and answer that the model was made for."""
        return self.checkpoint.config.get_text_config().max_position_embeddings

    @property
    def selected(self) -> torch.Tensor | None:
        """(layers, heads) 1 for the measured heads, else 0; None: all."""
        return self.heads.selected(self.checkpoint.num_heads) if self.heads else None


def prepare(model: ModelSettings, settings: AnswerSettings, questions: Any) -> Job:
    """Read and check the checkpoint, but for the weights, then the test set: a path, its questions, or what reads them.

    Raises DataError, ValueError, FileNotFoundError.
    """
    require_usable(use_cpu=False)
    checkpoint = model.open()
    questions = questions() if callable(questions) else questions
    questions = questions if isinstance(questions, list) else read_questions(questions)
    store = ImageStore(model.image_folder)
    refuse_duplicates([(question.id, question.where) for question in questions])
    if is_main_process():  # if it finds something it ends, and the launcher ends the others
        check_pictures(questions, store, checkpoint.family, model.check_images)
    return job_of(checkpoint, model, settings, questions, store)


def job_of(
    checkpoint: Checkpoint, model: ModelSettings, settings: AnswerSettings, questions: list[Question], store: Pictures
) -> Job:
    """The job of questions whose pictures are looked at. Raises ValueError."""
    family = checkpoint.family
    prompts = [encode_prompt(family, question) for question in questions]
    extra = _image_lengths(family, questions, store)
    lengths = [len(ids) + sum(more) for ids, more in zip(prompts, extra, strict=True)]
    layers, heads = _measured(settings, checkpoint)
    order = sorted(range(len(prompts)), key=lambda number: -lengths[number])  # out of memory comes first, not last
    job = Job(
        model=model,
        settings=settings,
        checkpoint=checkpoint,
        questions=questions,
        prompts=prompts,
        batches=[order[start : start + model.batch_size] for start in range(0, len(order), model.batch_size)],
        store=store,
        layers=layers,
        mapped=spread(questions, settings.attention_maps) if layers else frozenset(),
        heads=heads,
        lengths=lengths,
    )
    too_long = sum(length + settings.max_new_tokens > job.context for length in lengths)
    if too_long:
        logger.warning(
            "the longest prompt has %d tokens; the model was made for %d with the answer. %d of %d prompts may be too "
            "long: answers that are get `is_too_long`, and are counted in scores", max(lengths), job.context, too_long,
            len(lengths),
        )  # fmt: skip
    return job


def encode_prompt(family: Family, question: Question) -> list[int]:
    """Token ids of a question's prompt, one image token per picture. Raises ValueError naming the record."""
    try:
        return family.encode_prompt(question.prompt, question.context)
    except ValueError as error:
        raise ValueError(f"{question.where}: {error}") from error


def _image_lengths(family: Family, questions: Sequence[Question], store: Pictures) -> Iterator[list[int]]:
    """For each question how many tokens more each of its pictures takes than the one that stands for it."""
    for question in questions:
        sizes = [None] * len(question.images) if family.fixed else [store.size(name) for name in question.images]
        try:
            yield [family.num_image_tokens(size, len(sizes)) - 1 for size in sizes]
        except ValueError as error:  # of a shape that the family refuses
            raise ValueError(f"{question.where}: {error}") from error


def _measured(settings: AnswerSettings, checkpoint: Checkpoint) -> tuple[list[int], Heads | None]:
    """(layers, heads) whose attention is measured."""
    if settings.attention_layers == "none":
        return [], None
    layers = layer_range(checkpoint.num_layers, settings.attention_layers)
    if not settings.attention_heads:
        return sorted(layers), None
    among = None if settings.attention_layers == "auto" else layers
    heads = select_heads(settings.attention_heads, settings.top_heads, checkpoint, among)
    return sorted(heads.layers), heads


def spread(questions: Sequence[Question], count: int) -> frozenset[int]:
    """Numbers of `count` questions, taken in turn from every format and number of images."""
    groups: dict[tuple, list[int]] = {}
    for number, question in enumerate(questions):
        groups.setdefault((question.image_type, len(question.images), question.grid), []).append(number)
    turns = sorted(
        (turn, group, number) for group, own in enumerate(groups.values()) for turn, number in enumerate(own)
    )
    return frozenset(number for _, _, number in turns[: max(count, 0)])


def identify(job: Job) -> dict[str, Any]:
    """What decides the answers, so that those of another run are neither continued nor overwritten."""
    arguments = dataclasses.asdict(job.model) | dataclasses.asdict(job.settings)
    arguments["merge_adapter"] = job.model.merges(job.checkpoint)  # what is done, not that it was decided here
    asked = [
        (q.id, q.prompt, q.images, q.answer, in_digests(q.targets), q.target_box, q.grid, q.extra, *q.context)
        for q in job.questions
    ]
    return {
        "arguments": {name: value for name, value in arguments.items() if name not in PROCESS_FLAGS},
        "questions": f"{len(job.questions)} ({_digest(asked)})",
        "weights": job.checkpoint.digest[:16],
        "attention_layers": job.layers,
        "attention_heads": job.heads and job.heads.to_json(),
        "given": _digest(job.given) if job.given else None,
    }


def digest_of(question: Question) -> str:
    """Of what is asked, whatever its id and its file."""
    return _digest((question.prompt, question.images, question.image_type, in_digests(question.targets)))


def _digest(content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


class Answers:
    """The answers file of a job in the making, shared out over all processes of the launcher.

    Iterate over it for the batches that are not on disk yet, `append` what comes of each, then `finish`. It ends the
    process with one line where the weights do not load, the disk is full or a picture has become unreadable.
    """

    def __init__(self, job: Job, output: Path, identity: dict[str, Any]):
        self.job = job
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._lock = ExitStack()
        with user_errors():
            if is_main_process():
                self._lock.enter_context(only_writer(output))
            self.store = AnswerStore(output, identity)
            self.is_finished = self.store.is_finished
            self._done = set() if self.is_finished else self.store.begin()
        if self.is_finished:
            logger.info("%s is finished: nothing to do", output)
        elif self.world > 1 and not torch.distributed.is_initialized():
            # Processes only wait for each other, for however long the slowest takes.
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))

    @property
    def left(self) -> list[int]:
        """Numbers of the batches of this process's share that were not on disk at the start."""
        if self.is_finished:
            return []
        numbers = range(self.rank, len(self.job.batches), self.world)
        return [number for number in numbers if not set(self.job.batches[number]) <= self._done]

    def __iter__(self) -> Iterator[tuple[Any, list[int], PromptBatch]]:
        """(model, numbers of the questions, their batch) of what is left."""
        yield from batches_of(self.job, self.left)

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Put the records of a batch on disk, each with the `number` of its question."""
        with self._writing():
            self.store.append(self.rank, [record for record in records if record["number"] not in self._done])

    def finish(self) -> None:
        """Wait for all processes, and write the answers file, which is there for all of them afterwards."""
        if not self.is_finished:
            self._wait()
            if is_main_process():
                self._merge()
            self._wait()
        self._lock.close()

    def stop(self, message: str) -> NoReturn:
        """End the process with one line; what was appended stays."""
        self._lock.close()
        stop(message, from_any_process=True)

    def _wait(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    def _merge(self) -> None:
        with self._writing():
            counts = self.store.finish([question.id for question in self.job.questions])
        logger.info("%d answers in %s", counts["answers"], self.store.output)
        if counts["cut_off"]:
            limit = self.job.settings.max_new_tokens
            logger.warning("%d of them did not end and were cut off at --max_new_tokens %d", counts["cut_off"], limit)
        if counts["too_long"]:
            limit = self.job.context
            logger.warning("%d of them are beyond the %d tokens that the model was made for", counts["too_long"], limit)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """End the process with one line where the disk is full."""
        try:
            yield
        except OSError as error:
            self.stop(
                f"{self.store.output}: cannot be written ({error}); the answers so far are in {self.store.parts}: "
                "make room and start the same command again"
            )


def answer(job: Job, output: Path, identity: dict[str, Any], steer: Steer | None = None) -> None:
    """Answer every question of a job and write answers.jsonl, going on where a killed run was."""
    answers = Answers(job, output, identity)
    for model, numbers, batch in answers:
        found = generate(model, job.family, batch, job.layers, steer, job.selected, **job.settings.generation)
        answers.append([record(job, number, given) for number, given in zip(numbers, found, strict=True)])
    answers.finish()


def batches_of(job: Job, own: Sequence[int]) -> Iterator[tuple[Any, list[int], PromptBatch]]:
    """(model, numbers of the questions, their batch) of batches; weights are loaded if there are any."""
    if not own:
        return
    device = own_device()
    with user_errors():
        model = loaded(job.checkpoint, job.model, device)
    announce(device, job.model.num_workers, "--num_workers")
    loader = DataLoader(
        Batches(job, own), batch_size=None, num_workers=job.model.num_workers, pin_memory=torch.cuda.is_available()
    )
    total = sum(len(job.batches[number]) for number in own)
    with Progress(total=total, desc="answers", unit="answer", disable=not is_main_process()) as bar:
        for number, batch in loader:
            if isinstance(batch, str):
                stop(batch, from_any_process=True)
            torch.manual_seed(job.settings.seed + number)
            yield model, job.batches[number], batch
            bar.update(len(job.batches[number]))


def loaded(checkpoint: Checkpoint, settings: ModelSettings, device: torch.device):
    """The model to answer with, on a device; one line says what becomes of its adapter. Raises like `load`."""
    model = checkpoint.load(settings.torch_dtype).eval().to(device)
    if not settings.merges(checkpoint):
        if checkpoint.base is not None:
            logger.info("the adapter is computed apart from the weights below it (--merge_adapter)")
        return model
    model, rounding = merge(model)
    logger.info(
        "the adapter is merged into the weights below it (--merge_adapter): rounded to %s, %.1f %% of what it changes "
        "stay as they were", settings.torch_dtype, 100 * rounding.share,
    )  # fmt: skip
    return model


class Batches(Dataset):
    """The batches of one process, made by workers ahead of the model. An item that cannot be made is its error."""

    def __init__(self, job: Job, numbers: Sequence[int]):
        self.job, self.numbers = job, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, PromptBatch | str]:
        number = self.numbers[index]
        asked = self.job.batches[number]
        try:
            return number, make_batch(self.job, asked[:1] if self.job.given else asked)
        except (OSError, ValueError) as error:  # an exception of a worker would arrive as a traceback
            return number, str(error)


def make_batch(job: Job, numbers: Sequence[int]) -> PromptBatch:
    """The batch of the given questions."""
    prompts, tokens, regions, pixels = [], [], [], []
    for number in numbers:
        question = job.questions[number]
        pictures = [job.store.open(name) for name in question.images]
        pixels.append(job.family.pixels(job.alter(question, pictures) if job.alter else pictures))
        tokens.append(images := job.family.images([picture.size for picture in pictures]))
        prompts.append(job.family.expand(job.prompts[number], images))
        regions.append(prompt_regions(question, images))
    pointed = [pointed_at(job.questions[number]) for number in numbers]
    is_mapped = [number in job.mapped for number in numbers]
    batch = batch_prompts(job.family, prompts, tokens, regions, job.family.join(pixels), pointed, is_mapped)
    return batch.without_target() if job.hides_target else batch


def record(job: Job, number: int, given: Generated) -> dict[str, Any]:
    """One line of answers.jsonl, with the question's number for the merge and its own further fields."""
    question = job.questions[number]
    has_target, grid, parts = bool(question.targets), question.grid, len(question.images)
    if question.image_type == "collage":
        grid = grid or collage_grid(job.store.size(question.images[0]))
        parts = max(1, grid[0] * grid[1])
    own = {
        "number": number,
        "question_id": question.id,
        "text": given.text,
        "attention_ratio": given.ratio if has_target else None,
        "attention_ratio_by_layer": given.ratio_by_layer if has_target else None,
        "attention_by_image": given.shares,
        "confidence": given.confidence,
        "perplexity": given.perplexity,
        "scale": given.factor,
        "num_tokens": len(given.tokens),
        "is_complete": given.is_complete,
        "is_too_long": job.lengths[number] + len(given.tokens) > job.context,
        "prompt": question.prompt,
        "answer": question.answer or None,
        "image_type": question.image_type,
        **target_fields(question.targets),
        "num_images": parts,
    }
    if question.context:
        own["context"] = messages(question.context)
    if parts > len(question.images):  # of a collage, and perhaps read off its size
        own["grid"] = list(grid)
    if number in job.mapped:
        images = job.family.images([job.store.size(name) for name in question.images])
        own["attention_map"] = attention_map(given.by_token, images)
    return own | {name: value for name, value in question.extra.items() if name not in own}
