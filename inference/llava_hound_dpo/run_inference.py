"""Answer a multi-image test set: `python -m inference.llava_hound_dpo.run_inference --help`, or by torchrun.

Batches are fixed by the test set alone (sorted by length), so that one process, several, and a run that was killed and
started again all compute the same numbers. Every finished batch is on disk at once; the answers file is written, in
the order of the test set, when all are there.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava.attention import layer_range
from llava.checkpoints import find_source, load_config, load_model, load_processor
from llava.conversation import encode_prompt
from llava.generation import Generated, PromptBatch, batch_prompts, generate
from llava.image import ImageStore, pixel_values
from llava.layout import PatchGrid, expand_images, target_weights
from llava.records import DataError, Question, read_questions
from llava.runtime import is_main_process, leave, setup_logging, user_errors, write_run_json, write_text

logger = logging.getLogger(__name__)


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
    layers: list[int]


def main() -> None:
    """Check, answer what is not answered yet, merge."""
    args = parse_args()
    setup_logging()
    with user_errors():
        job = prepare(args)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    parts = args.output.with_name(args.output.name + ".parts")
    with user_errors():
        identity = identify(args, job)
        done = resume(parts, identity)
    if world > 1:
        gpu = {"backend": "cpu:gloo,cuda:nccl", "device_id": own_device()}
        torch.distributed.init_process_group(**gpu if torch.cuda.is_available() else {"backend": "gloo"})
    own = [number for number in range(rank, len(job.batches), world) if not set(job.batches[number]) <= done]
    if own:
        answer(args, job, own, done, parts / f"{rank}.jsonl")
    if world > 1:
        torch.distributed.barrier()
    if is_main_process():
        merge(args.output, parts, job.questions)
        write_run_json(args.output.with_suffix(".run.json"), **identity, counts={"answers": len(job.questions)})
        logger.info("%d answers in %s", len(job.questions), args.output)
    leave()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="checkpoint or adapter of any dialect")
    parser.add_argument("--only_base_model", action="store_true", help="answer with the base below the adapter")
    parser.add_argument("--image_tower", help="vision tower of an original checkpoint")
    parser.add_argument("--data_path", required=True, help="test set: JSON array or JSONL")
    parser.add_argument("--image_folder", required=True, help="folder, .zip or .tar of the pictures")
    parser.add_argument("--output", type=Path, required=True, help="answers file to write (answers.jsonl)")
    parser.add_argument("--image_aspect_ratio", choices=["pad", "crop"], default="pad", help="as in training")
    parser.add_argument("--attention_layers", default="auto", help="layers of the attention ratio: auto, 14-22 or 3,5")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts per batch")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="tokens of an answer at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus of sampling")
    parser.add_argument("--num_beams", type=int, default=1, help="beams")
    parser.add_argument("--seed", type=int, default=0, help="of sampling; every batch has its own stream")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read pictures ahead")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                        help="auto: bfloat16 on a GPU, float32 on a CPU")  # fmt: skip
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> Job:
    """Read and check the test set and the processor. Raises DataError, ValueError, FileNotFoundError."""
    if args.num_beams > 1 and args.temperature > 0:
        raise ValueError("--num_beams and --temperature together are not supported: choose one")
    source = find_source(args.model_name_or_path, args.image_tower)
    path = source.root.path if args.only_base_model else source.path
    config, processor = load_config(path, args.image_tower), load_processor(path, args.image_tower)
    grid = PatchGrid.of(processor.image_processor, config.vision_config, pad=args.image_aspect_ratio == "pad")
    questions, store = read_questions(args.data_path), ImageStore(args.image_folder)
    check(questions, store)
    prompts = [
        expand_images(encode_prompt(processor.tokenizer, q.prompt), config.image_token_id, grid.num_tokens)
        for q in questions
    ]
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))  # out of memory comes first, not last
    batches = [order[start : start + args.batch_size] for start in range(0, len(order), args.batch_size)]
    layers = sorted(layer_range(config.text_config.num_hidden_layers, args.attention_layers))
    return Job(path, questions, prompts, batches, store, grid, processor, config.image_token_id, layers)


def check(questions: Sequence[Question], store: ImageStore) -> None:
    """Raises DataError listing questions without their pictures or with an id used before."""
    problems, seen = [], set()
    for question in questions:
        problems += [f"{question.where}: no picture {n} in {store.path}" for n in question.images if not store.has(n)]
        if question.id in seen:
            problems.append(f"{question.where}: the id is used twice, so its answers could not be told apart")
        seen.add(question.id)
    if problems:
        raise DataError(problems)


def identify(args: argparse.Namespace, job: Job) -> dict[str, Any]:
    """What decides the answers: unfinished ones of another run are not continued."""
    names = set(vars(args)) - {"output", "num_workers"}
    return {"arguments": {name: str(getattr(args, name)) for name in sorted(names)}, "questions": len(job.questions)}


def resume(parts: Path, identity: dict[str, Any]) -> set[int]:
    """Numbers of the questions answered before. Raises ValueError if they are another run's."""
    marker = parts / "run.json"
    if not marker.is_file():
        write_text(marker, json.dumps(identity, indent=2))
        return set()
    if json.loads(marker.read_text(encoding="utf-8")) != identity:
        raise ValueError(
            f"{parts} holds answers of another run (see run.json there): remove it or choose another --output"
        )
    done = {line["number"] for line in read_parts(parts)}
    if done:
        logger.info("%d answers found in %s: continuing", len(done), parts)
    return done


def read_parts(parts: Path) -> Iterable[dict[str, Any]]:
    """Finished answers of all processes; a line cut short by a kill is passed over and answered again."""
    for path in sorted(parts.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


class Batches(Dataset):
    """The batches of one process, made by workers ahead of the model."""

    def __init__(self, job: Job, numbers: Sequence[int]):
        self.job, self.numbers = job, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, PromptBatch]:
        job, number = self.job, self.numbers[index]
        questions = [job.questions[i] for i in job.batches[number]]
        pictures = [[job.store.open(name) for name in question.images] for question in questions]
        targets = [
            target_weights(question, [picture.size for picture in own], job.grid)
            for question, own in zip(questions, pictures, strict=True)
        ]
        flat = [picture for own in pictures for picture in own]
        pixels = pixel_values(flat, job.processor.image_processor, job.grid.pad)
        prompts = [job.prompts[i] for i in job.batches[number]]
        return number, batch_prompts(prompts, targets, pixels, job.image_token, job.processor.tokenizer.pad_token_id)


def answer(args: argparse.Namespace, job: Job, own: Sequence[int], done: set[int], path: Path) -> None:
    """Answer the batches of this process; each is on disk before the next one starts."""
    model = load_model(job.path, dtype_of(args), args.image_tower)
    model.eval().to(own_device())
    settings: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
    if args.temperature > 0:
        settings |= {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    loader = DataLoader(Batches(job, own), batch_size=None, num_workers=args.num_workers)
    total = sum(len(job.batches[number]) for number in own)
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm(total=total, desc="answers", disable=not is_main_process()) as bar,
    ):
        for number, batch in loader:
            torch.manual_seed(args.seed + number)
            found = generate(model, job.processor.tokenizer, batch, job.layers, **settings)
            rows = [(i, a) for i, a in zip(job.batches[number], found, strict=True) if i not in done]
            # A line that a kill cut short ends here, so that it cannot swallow the next one.
            file.write("\n" + "\n".join(json.dumps(record(i, job.questions[i], a)) for i, a in rows) + "\n")
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(found))


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


def record(number: int, question: Question, answer: Generated) -> dict[str, Any]:
    """One line of answers.jsonl (design §8), with the question's number for the merge."""
    carried = {name: question.extra[name] for name in ("others", "choices") if name in question.extra}
    return {
        "number": number,
        "question_id": question.id,
        "text": answer.text,
        "attention_ratio": answer.ratio,
        "attention_ratio_by_layer": answer.ratio_by_layer,
        "confidence": answer.confidence,
        "scale": 1.0,
        "num_tokens": answer.num_tokens,
        "prompt": question.prompt,
        "answer": question.answer,
        "image_type": question.image_type,
        "target": question.target + 1,
        "num_images": len(question.images) if question.grid is None else question.grid[0] * question.grid[1],
        **carried,
    }


def merge(output: Path, parts: Path, questions: Sequence[Question]) -> None:
    """Write the answers file in the order of the test set. Raises RuntimeError if an answer is missing."""
    lines = {line.pop("number"): line for line in read_parts(parts)}
    missing = [question.id for number, question in enumerate(questions) if number not in lines]
    if missing:
        raise RuntimeError(f"{len(missing)} questions have no answer, {missing[0]} first: start the same command again")
    write_text(output, "".join(json.dumps(lines[number]) + "\n" for number in range(len(questions))))
    for path in parts.iterdir():
        path.unlink()
    parts.rmdir()


if __name__ == "__main__":
    sys.exit(main())
