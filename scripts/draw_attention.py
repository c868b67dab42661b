"""Heat maps of where a model looks, on the original pictures, one PNG a prompt and a page of all (index.html):
`python -m scripts.draw_attention --model_name_or_path MODEL --data_path test.json --image_folder IMAGES --output DIR`

Answers the questions and draws the attention mass of every image patch, averaged over layers and heads, with the target
outlined. With --answers, the answers of that file are looked at instead, whoever gave them.
"""

import re
import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from llava.answering import Job, batches_of, prepare
from llava.command_line import check_numbers, flag, parse
from llava.generation import PromptBatch, generate
from llava.heads import HeadSettings
from llava.heatmap import attention_map, draw_prompt, explained
from llava.measuring import measure
from llava.records import IMAGE, Question, read_answers
from llava.regions import outlined
from llava.runtime import check_outputs, setup_logging, user_errors, write_text
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
        if self.output.exists() and not self.output.is_dir():
            raise NotADirectoryError(f"--output {self.output} is a file; give a folder")
        check_outputs([self.output / "index.html"], [self.data_path, self.answers])

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
    drawn: list[dict[str, str]] = []
    for model, (number,), batch in batches_of(job, range(len(chosen))):
        question = job.questions[number]
        text, masses = look(model, job, batch, question, texts and texts[question.id])
        path = own.output / file_name(question.id, {one["file"] for one in drawn})
        draw(job, number, masses, own.height, text).save(path)
        asked = asked_of(question)
        drawn.append({"file": path.name, "id": question.id, "question": asked, "answer": text, "true": question.answer})
        tqdm.write(f"{path}  {asked}  {text}")
    write_text(own.output / "index.html", page(job, drawn))


@torch.no_grad()
def look(model, job: Job, batch: PromptBatch, question: Question, given: str | None) -> tuple[str, torch.Tensor]:
    """(answer, mass on each image token): the model's own answer to a question, its batch alone, or a `given` one."""
    if given is None:
        (found,) = generate(model, job.family, batch, job.layers, None, job.selected, **job.settings.generation)
        return found.text, found.by_token
    answer = job.family.encode_answer(question.prompt, given, question.context)
    (found,) = measure(model, job.family, batch, [answer], job.layers, job.selected)
    return given, found.by_token


def draw(job: Job, number: int, masses: torch.Tensor, height: int, text: str) -> Image.Image:
    """The pictures of a question with the map over them and its targets outlined; question, answer and scale around."""
    question = job.questions[number]
    pictures = [job.store.open(name) for name in question.images]
    maps = attention_map(masses, job.family.images([picture.size for picture in pictures]))
    boxes = outlined(question, pictures[0].size)
    texts = [asked_of(question), f"Answer: {text}", *([f"Right: {question.answer}"] if question.answer else [])]
    hottest = max(np.max(one["mass"]) for one in maps)
    return explained(draw_prompt(pictures, maps, question.targets, boxes, height), texts, hottest)


def asked_of(question: Question) -> str:
    """What a prompt asks, in one line and without its pictures."""
    return " ".join(re.sub(rf"(?:Image\d+:)?\s*{IMAGE}\s*", " ", question.prompt).split()) or question.prompt


def page(job: Job, drawn: list[dict[str, str]]) -> str:
    """The page of all that was drawn."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("maps.html.j2")
    return template.render(maps=drawn, model=job.checkpoint.path, layers=job.layers, heads=job.heads)


def choose(own: DrawSettings, ids: list[str], spread: frozenset[int], texts: dict | None) -> list[int]:
    """Numbers of the questions to draw. Raises ValueError for an id that is not there or has no answer."""
    wanted = own.ids or [ids[number] for number in sorted(spread)]
    for where, known in ((own.data_path, ids), (own.answers, texts)):
        missing = [id for id in wanted if known is not None and id not in known]
        if missing:
            raise ValueError(f"{where}: no {missing[0]!r} there ({len(missing)} of {len(wanted)} ids are missing)")
    return [ids.index(id) for id in wanted]


def file_name(id: str, taken: Collection[str]) -> str:
    """An id as the name of a PNG file that no other id has."""
    name = re.sub(r"[^\w.-]+", "_", id)[:100]
    return next(n for n in (f"{name}.png", *(f"{name}_{k}.png" for k in range(2, len(taken) + 3))) if n not in taken)


if __name__ == "__main__":
    sys.exit(main())
