"""Which heads look at the image that a prompt refers to:
`python -m scripts.discover_heads --model_name_or_path M --data_path validation.json --image_folder I --output FILE`

Answers the prompts with several parts (images, cells, inner and outer picture), greedily. Every (layer, head) is ranked
by how well its image mass on the answer's rows picks the referred part. The file goes to --attention_heads of training,
inference, data selection and AdaptViz.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from llava.answering import Job, add_model_arguments, identify, positive, prepare, spread, work
from llava.checkpoints import find_source, weight_digest
from llava.generation import PromptBatch, generate
from llava.heads import TOP, Ranking, rank, shares_of_parts
from llava.records import Question, read_prompts
from llava.runtime import ArgumentParser, setup_logging, user_errors

logger = logging.getLogger(__name__)

SEVERAL_PARTS = ("sequence", "collage", "pip")


def main() -> None:
    """Measures, ranks, writes, prints the best."""
    args = parse_args()
    setup_logging()
    with user_errors():
        check_output(args)
        job = prepare(args, choose(args))
    shares, targets = measure(args, job)
    with user_errors():
        if not shares:
            raise ValueError(f"{args.data_path}: no prompt has several parts to tell apart; collages need their `grid`")
        ranking = ranking_of(args, job, shares, targets)
    ranking.write(args.output)
    print(table(ranking))
    print(f"{ranking.num_prompts} prompts; all {len(ranking.ranking)} heads in {args.output}")


def parse_args() -> argparse.Namespace:
    """The command line, with what `prepare` needs."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--data_path", required=True, help="test set or preference pairs, not those to be tested on")
    add("--output", type=Path, required=True, help="file to write (heads.json)")
    add("--limit", type=positive, help="how many prompts, spread over formats (default: all)")
    add("--layers", dest="attention_layers", default="all", help="layers whose heads are ranked: all, 14-22 or 3,5")
    add("--max_new_tokens", type=positive, default=128, help="tokens of an answer at most")
    add_model_arguments(parser)
    args = parser.parse_args()
    fixed = {"temperature": 0.0, "top_p": 1.0, "num_beams": 1, "seed": 0, "attention_maps": 0, "attention_heads": None}
    return argparse.Namespace(**vars(args), **fixed)


def check_output(args: argparse.Namespace) -> None:
    """Raises ValueError for a file that cannot be written, or that would change the checkpoint's digest."""
    if args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder; give a file, as heads.json")
    source = find_source(args.model_name_or_path, args.image_tower)
    if args.output.resolve().parent in {Path(path).resolve() for path in (source.path, source.root.path)}:
        raise ValueError(
            f"--output {args.output} lies in the checkpoint, whose digest says which one it is: write it elsewhere"
        )


def choose(args: argparse.Namespace) -> list[Question]:
    """The prompts to ask. Raises DataError, ValueError, FileNotFoundError."""
    questions = [question for question in read_prompts(args.data_path) if question.image_type in SEVERAL_PARTS]
    if not questions:
        raise ValueError(f"{args.data_path}: no prompt refers to one of several images: there is nothing to tell apart")
    chosen = spread(questions, len(questions) if args.limit is None else args.limit)
    return [questions[number] for number in sorted(chosen)]


def measure(args: argparse.Namespace, job: Job) -> tuple[list[torch.Tensor], list[int]]:
    """For every prompt with several parts (layers, heads, parts) shares of the image mass, and the part referred to."""

    def records_of(model, numbers: Sequence[int], batch: PromptBatch) -> list[dict]:
        settings = {"each_head": True, "max_new_tokens": args.max_new_tokens}
        found = generate(model, job.processor.tokenizer, batch, job.layers, **settings)
        return [
            {"number": number, "shares": shares_of_parts(given.by_head)}
            for number, given in zip(numbers, found, strict=True)
        ]

    batches = range(len(job.batches))
    records = [r for records in work(args, job, batches, records_of) for r in records if r["shares"].shape[-1] > 1]
    return [record["shares"] for record in records], [job.questions[record["number"]].target for record in records]


def ranking_of(args: argparse.Namespace, job: Job, shares: Sequence[torch.Tensor], targets: Sequence[int]) -> Ranking:
    """The file's content. Raises ValueError where nothing can be ranked."""
    base = find_source(job.path, args.image_tower).root.path
    return Ranking(
        model=job.path,
        base=base,
        weights=weight_digest(job.path),
        base_weights=weight_digest(base),
        data=identify(args, job)["questions"],
        num_prompts=len(shares),
        chance=sum(1 / own.shape[-1] for own in shares) / len(shares),
        ranking=rank(shares, targets, job.layers),
    )


def table(ranking: Ranking) -> str:
    """The best heads, a line each."""
    lines = ["layer  head     AUC  picks the image asked about"]
    for one in ranking.ranking[:TOP]:
        lines.append(f"{one.layer:5d}  {one.head:4d}  {one.auc:6.3f}  {100 * one.accuracy:5.1f} %")
    lines.append(f"{'at random':>11}  {0.5:6.3f}  {100 * ranking.chance:5.1f} %")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
