"""Heat maps of where a model looks, on the original pictures, one PNG a prompt:
`python -m scripts.draw_attention --model_name_or_path MODEL --data_path test.json --image_folder IMAGES --output DIR`

Answers the questions and draws the attention mass of every image patch, averaged over layers and heads, with the target
outlined. With --answers, the answers of that file are looked at instead, whoever gave them.
"""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from llava.answering import Job, batches_of, prepare
from llava.attention import mean_over_layers
from llava.command_line import check_numbers, flag, parse
from llava.generation import PromptBatch, generate
from llava.heads import HeadSettings
from llava.heatmap import attention_map, draw_prompt
from llava.measuring import masses_of
from llava.records import read_answers
from llava.regions import needs_sizes, target_box
from llava.runtime import setup_logging, user_errors
from llava.settings import AnswerSettings, ModelSettings


@dataclass(kw_only=True)
class DrawSettings(HeadSettings):
    """What is drawn."""

    _argument_group_name = "maps"

    data_path: str = flag("test set: JSON array or JSONL")
    answers: Path | None = flag("answers.jsonl whose answers are looked at; default: the model's own", None)
    output: Path = flag("folder for the PNG files")
    ids: list[str] | None = flag("questions to draw; default: --limit of them, spread over formats", None)
    limit: int = flag("how many questions to draw without --ids", 12)
    attention_layers: str = flag("layers to average over: auto, 14-22 or 3,5", "auto")
    height: int = flag("px of a drawn picture", 336)
    max_new_tokens: int = flag("tokens of an answer at most", 128)

    def __post_init__(self):
        check_numbers(self, limit=(1, None), height=(16, 4096))

    def answering(self) -> AnswerSettings:
        """The same, as a job takes them."""
        names = ("attention_layers", "attention_heads", "top_heads", "max_new_tokens")
        return AnswerSettings(attention_maps=self.limit, **{name: getattr(self, name) for name in names})


def main() -> None:
    """Draws the maps of the chosen questions."""
    setup_logging()
    with user_errors():
        own, model = parse((DrawSettings, ModelSettings), __doc__)
        job = prepare(replace(model, batch_size=1), own.answering(), own.data_path)
        texts = {a.question_id: a.text for a in read_answers(own.answers)} if own.answers else None
        chosen = choose(own, [question.id for question in job.questions], job.mapped, texts)
        own.output.mkdir(parents=True, exist_ok=True)
    job = replace(job, mapped=frozenset(chosen), batches=[[number] for number in chosen])
    for model, (number,), batch in batches_of(job, range(len(chosen))):
        question = job.questions[number]
        text, masses = look(model, job, batch, None if texts is None else (question.prompt, texts[question.id]))
        path = own.output / f"{file_name(question.id)}.png"
        draw(job, number, masses, own.height).save(path)
        tqdm.write(f"{path}  {question.prompt.splitlines()[-1]}  {text}")


@torch.no_grad()
def look(model, job: Job, batch: PromptBatch, given: tuple[str, str] | None) -> tuple[str, torch.Tensor]:
    """(answer, mass on each image token): the model's own answer to a batch of one, or a `given` one to its prompt."""
    if given is None:
        (found,) = generate(model, job.family, batch, job.layers, None, job.selected, **job.settings.generation)
        return found.text, found.by_token
    masses = masses_of(model, batch, job.family.encode_answer(*given), job.layers, job.selected)
    is_image = batch.input_ids[0] == job.family.image_id
    return given[1], mean_over_layers(masses[:, batch.num_regions[0] :][:, is_image], job.selected)


def draw(job: Job, number: int, masses: torch.Tensor, height: int) -> Image.Image:
    """The pictures of a question with the map over them and its target outlined."""
    question = job.questions[number]
    pictures = [job.store.open(name) for name in question.images]
    maps = attention_map(masses, [job.family.image(picture.size) for picture in pictures])
    box = target_box(question, pictures[0].size) if needs_sizes(question) else None
    return draw_prompt(pictures, maps, question.target, box, height)


def choose(own: DrawSettings, ids: list[str], spread: frozenset[int], texts: dict | None) -> list[int]:
    """Numbers of the questions to draw. Raises ValueError for an id that is not there or has no answer."""
    wanted = own.ids or [ids[number] for number in sorted(spread)]
    for where, known in ((own.data_path, ids), (own.answers, texts)):
        missing = [id for id in wanted if known is not None and id not in known]
        if missing:
            raise ValueError(f"{where}: no {missing[0]!r} there ({len(missing)} of {len(wanted)} ids are missing)")
    return [ids.index(id) for id in wanted]


def file_name(id: str) -> str:
    """An id as a file name."""
    return re.sub(r"[^\w.-]+", "_", id)[:100]


if __name__ == "__main__":
    sys.exit(main())
