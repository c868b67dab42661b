"""Answering a whole test set: what plain inference and AdaptViz share.

Batches are fixed by the test set alone (sorted by length), so that one process, several, and a run that was killed and
started again all compute the same numbers.
"""

import argparse
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava.answers import AnswerStore
from llava.attention import layer_range
from llava.checkpoints import find_source, load_config, load_model, load_processor, weight_digest
from llava.checks import DEPTHS, check_pictures
from llava.conversation import encode_prompt
from llava.generation import Generated, PromptBatch, Steer, batch_prompts, generate
from llava.heads import Heads, add_head_arguments, choose_heads
from llava.heatmap import attention_map, patch_masses
from llava.image import ImageStore, pixel_values
from llava.layout import PatchGrid, expand_images, prompt_regions
from llava.records import Question, read_questions, refuse_duplicates
from llava.runtime import is_main_process, stop, user_errors

logger = logging.getLogger(__name__)

# Flags that do not change the answers.
PROCESS_FLAGS = {"output", "num_workers", "check_images"}


@dataclass(frozen=True)
class Job:
    """Everything checked and ready before the weights are loaded."""

    path: str  # checkpoint or adapter to answer with
    questions: list[Question]
    prompts: list[list[int]]  # token ids, image tokens expanded
    batches: list[list[int]]  # question numbers, longest prompts first
    store: ImageStore
    grid: PatchGrid
    processor: Any
    image_token: int
    num_layers: int  # of the language model
    num_heads: int  # of each layer
    layers: list[int]  # those whose attention is measured
    mapped: frozenset[int]  # questions whose attention map is kept
    alter: Callable[[Question, list[Image.Image]], list[Image.Image]] | None = None  # what is shown for the pictures
    heads: Heads | None = None  # those of `layers` whose attention is measured; None: all

    @property
    def chosen(self) -> torch.Tensor | None:
        """(layers, heads) 1 for the measured heads, else 0; None: all."""
        return self.heads.chosen(self.num_heads) if self.heads else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every stage that answers a test set."""
    add = parser.add_argument
    add("--data_path", required=True, help="test set: JSON array or JSONL")
    add("--output", type=Path, required=True, help="answers file to write (answers.jsonl)")
    add("--attention_layers", default="auto", help="layers of the attention ratio: auto, 14-22, 3,5 or none")
    add_head_arguments(parser)
    add("--attention_maps", type=int, default=12, help="questions whose answer keeps its map of attention by patch")
    add("--max_new_tokens", type=positive, default=128, help="tokens of an answer at most")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top_p", type=float, default=1.0, help="nucleus of sampling")
    add("--num_beams", type=positive, default=1, help="beams")
    add("--seed", type=int, default=0, help="of sampling; every batch has its own stream")
    add_model_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """The flags that say which model reads which pictures, and how."""
    add = parser.add_argument
    add("--model_name_or_path", required=required, help="checkpoint or adapter of any dialect")
    add("--only_base_model", action="store_true", help="answer with the base below the adapter")
    add("--image_tower", help="vision tower of an original checkpoint")
    add("--image_folder", required=True, help="folder, .zip or .tar of the pictures")
    add("--image_aspect_ratio", choices=["pad", "crop"], default="pad", help="as in training")
    add("--batch_size", type=positive, default=8, help="prompts per batch")
    add("--num_workers", type=int, default=2, help="processes that read pictures ahead")
    add("--check_images", choices=DEPTHS, default="full",
        help="before loading weights: decode every picture, read its header, or only see that it is there")  # fmt: skip
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="auto: bfloat16 on a GPU, float32 on a CPU")  # fmt: skip


def positive(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def prepare(args: argparse.Namespace, questions: list[Question] | None = None) -> Job:
    """Read and check the test set (unless `questions` are given) and the processor.

    Raises DataError, ValueError, FileNotFoundError.
    """
    _check_sampling(args)
    source = find_source(args.model_name_or_path, args.image_tower)
    path = source.root.path if args.only_base_model else source.path
    config, processor = load_config(path, args.image_tower), load_processor(path, args.image_tower)
    grid = PatchGrid.of(processor.image_processor, config.vision_config, pad=args.image_aspect_ratio == "pad")
    questions = read_questions(args.data_path) if questions is None else questions
    store = ImageStore(args.image_folder)
    refuse_duplicates([(question.id, question.where) for question in questions])
    if is_main_process():  # if it finds something it ends, and the launcher ends the others
        check_pictures(questions, store, grid, args.check_images)
    prompts = [
        expand_images(encode_prompt(processor.tokenizer, q.prompt), config.image_token_id, grid.num_tokens)
        for q in questions
    ]
    longest, limit = max(map(len, prompts)), config.text_config.max_position_embeddings
    if longest + args.max_new_tokens > limit:
        logger.warning("the longest prompt has %d tokens; the model was made for %d with the answer", longest, limit)
    sizes = config.text_config.num_hidden_layers, config.text_config.num_attention_heads
    layers, heads = _measured(args, path, *sizes)
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))  # out of memory comes first, not last
    return Job(
        path=path,
        questions=questions,
        prompts=prompts,
        batches=[order[start : start + args.batch_size] for start in range(0, len(order), args.batch_size)],
        store=store,
        grid=grid,
        processor=processor,
        image_token=config.image_token_id,
        num_layers=sizes[0],
        num_heads=sizes[1],
        layers=layers,
        mapped=spread(questions, args.attention_maps),
        heads=heads,
    )


def _check_sampling(args: argparse.Namespace) -> None:
    if args.num_beams > 1 and args.temperature > 0:
        raise ValueError("--num_beams and --temperature together are not supported: choose one")
    if args.temperature < 0 or not 0 < args.top_p <= 1:
        raise ValueError("--temperature must be 0 or more, and --top_p above 0 and up to 1")


def _measured(args: argparse.Namespace, path: str, num_layers: int, num_heads: int) -> tuple[list[int], Heads | None]:
    """(layers, heads) whose attention is measured."""
    if args.attention_layers == "none":
        return [], None
    if not args.attention_heads:
        return sorted(layer_range(num_layers, args.attention_layers)), None
    among = None if args.attention_layers == "auto" else layer_range(num_layers, args.attention_layers)
    heads = choose_heads(args.attention_heads, args.top_heads, path, num_layers, num_heads, among)
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


def identify(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """What decides the answers, so that those of another run are neither continued nor overwritten."""
    arguments = {name: str(value) for name, value in sorted(vars(args).items()) if name not in PROCESS_FLAGS}
    asked = [(q.id, q.prompt, q.images, q.answer, q.target, q.target_box, q.grid, q.extra) for q in job.questions]
    content = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
    return {
        "arguments": arguments,
        "questions": f"{len(job.questions)} ({content})",
        "weights": weight_digest(job.path)[:16],
        "attention_layers": job.layers,
        "attention_heads": job.heads and job.heads.to_json(),
    }


# The records of a batch, from the model and the numbers of its questions.
RecordsOf = Callable[[Any, Sequence[int], PromptBatch], list[dict[str, Any]]]


def run(args: argparse.Namespace, job: Job, identity: dict[str, Any], output: Path, records_of: RecordsOf) -> None:
    """Make the records that are not on disk yet, with all processes of the launcher, and merge them to `output`.

    Ends the process with one line where the weights do not load, the disk is full or a picture has become unreadable.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with user_errors():
        answers = AnswerStore(output, identity)
        if answers.is_finished:
            logger.info("%s is finished: nothing to do", output)
            return
        done = answers.begin()
    if world > 1:  # processes only wait for each other, for however long the slowest takes
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    own = [number for number in range(rank, len(job.batches), world) if not set(job.batches[number]) <= done]
    if own:
        for records in work(args, job, own, records_of):
            with _writing(answers):
                answers.append(rank, [record for record in records if record["number"] not in done])
    if world > 1:
        torch.distributed.barrier()
    if is_main_process():
        with _writing(answers):
            cut_off = answers.finish([question.id for question in job.questions])
        logger.info("%d answers in %s", len(job.questions), output)
        if cut_off:
            limit = args.max_new_tokens
            logger.warning("%d of them did not end and were cut off at --max_new_tokens %d", cut_off, limit)


@contextmanager
def _writing(answers: AnswerStore) -> Iterator[None]:
    """End the process with one line where the disk is full."""
    try:
        yield
    except OSError as error:
        stop(f"{answers.output}: cannot be written ({error}); the answers so far are in {answers.parts}: make room and "
             "start the same command again", from_any_process=True)  # fmt: skip


def work(args: argparse.Namespace, job: Job, own: Sequence[int], records_of: RecordsOf) -> Iterator[list[dict]]:
    """The records of each batch of this process."""
    with user_errors():
        model = load_model(job.path, dtype_of(args), args.image_tower)
    model.eval().to(own_device())
    loader = DataLoader(
        Batches(job, own), batch_size=None, num_workers=args.num_workers, pin_memory=torch.cuda.is_available()
    )
    total = sum(len(job.batches[number]) for number in own)
    with tqdm(total=total, desc="answers", unit="answer", disable=not is_main_process()) as bar:
        for number, batch in loader:
            if isinstance(batch, str):
                stop(batch, from_any_process=True)
            torch.manual_seed(args.seed + number)
            yield records_of(model, job.batches[number], batch)
            bar.update(len(job.batches[number]))


def generated(args: argparse.Namespace, job: Job, steer: Steer | None = None) -> RecordsOf:
    """Records of answers.jsonl (design §8): one generated answer a question."""
    settings: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
    if args.temperature > 0:
        settings |= {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}

    def records_of(model, numbers: Sequence[int], batch: PromptBatch) -> list[dict[str, Any]]:
        found = generate(model, job.processor.tokenizer, batch, job.layers, steer, job.chosen, **settings)
        return [
            record(number, job, given) | attention_map_of(model, job, number, given, steer)
            for number, given in zip(numbers, found, strict=True)
        ]

    return records_of


class Batches(Dataset):
    """The batches of one process, made by workers ahead of the model. An item that cannot be made is its error."""

    def __init__(self, job: Job, numbers: Sequence[int]):
        self.job, self.numbers = job, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, PromptBatch | str]:
        number = self.numbers[index]
        try:
            return number, make_batch(self.job, self.job.batches[number])
        except (OSError, ValueError) as error:  # an exception of a worker would arrive as a traceback
            return number, str(error)


def make_batch(job: Job, numbers: Sequence[int]) -> PromptBatch:
    """The batch of the given questions."""
    questions = [job.questions[number] for number in numbers]
    pictures = [[job.store.open(name) for name in question.images] for question in questions]
    if job.alter:
        pictures = [job.alter(question, own) for question, own in zip(questions, pictures, strict=True)]
    regions = [
        prompt_regions(question, [picture.size for picture in own], job.grid)
        for question, own in zip(questions, pictures, strict=True)
    ]
    pixels = pixel_values([p for own in pictures for p in own], job.processor.image_processor, job.grid.pad)
    prompts = [job.prompts[number] for number in numbers]
    types = [question.image_type for question in questions]
    return batch_prompts(prompts, regions, pixels, job.image_token, job.processor.tokenizer.pad_token_id, types)


def own_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    """The precision asked for."""
    if args.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, args.dtype)


def record(number: int, job: Job, given: Generated) -> dict[str, Any]:
    """One line of answers.jsonl (design §8), with the question's number for the merge and its own further fields."""
    question = job.questions[number]
    has_target = question.target is not None
    own = {
        "number": number,
        "question_id": question.id,
        "text": given.text,
        "attention_ratio": given.ratio if has_target else None,
        "attention_ratio_by_layer": given.ratio_by_layer if has_target else None,
        "attention_by_image": given.shares,
        "confidence": given.confidence,
        "scale": given.factor,
        "num_tokens": len(given.tokens),
        "is_complete": given.is_complete,
        "prompt": question.prompt,
        "answer": question.answer,
        "image_type": question.image_type,
        "target": question.target + 1 if has_target else None,
        "num_images": len(question.images) if question.grid is None else question.grid[0] * question.grid[1],
    }
    return own | {name: value for name, value in question.extra.items() if name not in own}


def attention_map_of(model, job: Job, number: int, given: Generated, steer: Steer | None) -> dict[str, Any]:
    """The `attention_map` of an answer that keeps one."""
    if number not in job.mapped or not job.layers:
        return {}
    sizes = [job.store.size(name) for name in job.questions[number].images]
    batch, tokenizer = make_batch(job, [number]), job.processor.tokenizer
    masses = patch_masses(model, tokenizer, batch, given.tokens, job.layers, job.image_token, steer, job.chosen)
    return {"attention_map": attention_map(masses, sizes, job.grid)}
