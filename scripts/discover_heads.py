"""Which heads look at the image that a prompt refers to:
`python -m scripts.discover_heads --model_name_or_path M --data_path validation.json --image_folder I --output FILE`

Answers the prompts with several parts (images, cells, inner and outer picture), greedily. Every (layer, head) is ranked
by how well its image mass on the answer's rows picks the referred part. The file goes to --attention_heads of training,
inference, data selection and AdaptViz.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llava.answering import Job, batches_of, identify, prepare, spread
from llava.command_line import check_numbers, flag, parse
from llava.generation import generate
from llava.heads import TOP, Ranking, rank, shares_of_parts
from llava.records import Question, read_prompts
from llava.runtime import check_outputs, setup_logging, user_errors
from llava.settings import AnswerSettings, ModelSettings

logger = logging.getLogger(__name__)

SEVERAL_PARTS = ("sequence", "collage", "pip")


@dataclass(kw_only=True)
class DiscoverSettings:
    """What the heads are ranked on."""

    _argument_group_name = "ranking"

    data_path: str = flag("test set or preference pairs, not those to be tested on")
    output: Path = flag("file to write (heads.json)")
    limit: int | None = flag("how many prompts, spread over formats; default: all", None)
    layers: str = flag("layers whose heads are ranked: all, 14-22 or 3,5", "all")
    max_new_tokens: int = flag("tokens of an answer at most", 128)

    def __post_init__(self):
        check_numbers(self, limit=(1, None))


def main() -> None:
    """Measures, ranks, writes, prints the best."""
    setup_logging()
    with user_errors():
        own, model = parse((DiscoverSettings, ModelSettings), __doc__)
        check_output(own, model)
        settings = AnswerSettings(attention_layers=own.layers, max_new_tokens=own.max_new_tokens, attention_maps=0)
        job = prepare(model, settings, choose(own))
    shares, targets = measure(job)
    with user_errors():
        if not shares:
            raise ValueError(f"{own.data_path}: no prompt has several parts to tell apart; collages need their `grid`")
        ranking = ranking_of(job, shares, targets)
    ranking.write(own.output)
    print(table(ranking))
    print(f"{ranking.num_prompts} prompts; all {len(ranking.ranking)} heads in {own.output}")


def check_output(own: DiscoverSettings, model: ModelSettings) -> None:
    """Raises ValueError for a file that cannot be written, or that would change the checkpoint's digest."""
    output = own.output
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; give a file, as heads.json")
    check_outputs([output], [own.data_path])
    checkpoint = model.open()
    if output.resolve().parent in {Path(path).resolve() for path in (checkpoint.path, checkpoint.root.path)}:
        raise ValueError(
            f"--output {output} lies in the checkpoint, whose digest says which one it is: write it elsewhere"
        )


def choose(own: DiscoverSettings) -> list[Question]:
    """The prompts to ask. Raises DataError, ValueError, FileNotFoundError."""
    questions = [question for question in read_prompts(own.data_path) if question.image_type in SEVERAL_PARTS]
    if not questions:
        raise ValueError(f"{own.data_path}: no prompt refers to one of several images: there is nothing to tell apart")
    chosen = spread(questions, len(questions) if own.limit is None else own.limit)
    return [questions[number] for number in sorted(chosen)]


def measure(job: Job) -> tuple[list[torch.Tensor], list[tuple[int, ...]]]:
    """(layers, heads, parts) shares of the image mass, and the parts referred to, of prompts that have others too."""
    shares, targets = [], []
    for model, numbers, batch in batches_of(job, range(len(job.batches))):
        found = generate(model, job.family, batch, job.layers, each_head=True, **job.settings.generation)
        for number, given in zip(numbers, found, strict=True):
            own, parts = shares_of_parts(given.by_head), job.questions[number].targets
            if own.shape[-1] > len(parts):
                shares.append(own)
                targets.append(parts)
    return shares, targets


def ranking_of(job: Job, shares: Sequence[torch.Tensor], targets: Sequence[tuple[int, ...]]) -> Ranking:
    """The file's content. Raises ValueError where nothing can be ranked."""
    checkpoint = job.checkpoint
    return Ranking(
        model=checkpoint.path,
        base=checkpoint.root.path,
        weights=checkpoint.digest,
        base_weights=checkpoint.root.digest,
        data=identify(job)["questions"],
        num_prompts=len(shares),
        chance=sum(len(parts) / own.shape[-1] for own, parts in zip(shares, targets, strict=True)) / len(shares),
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
