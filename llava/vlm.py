"""A model to ask from Python: `open_model(path).ask([picture, picture], "In Image2, what colour is the car?")`.

What the commands do with a test set, for pictures in memory: the same batches, the same measures, the same records.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from llava.adaptviz import AdaptViz
from llava.answering import Job, job_of, loaded, make_batch, record
from llava.asked import IMAGE, named_in, placeholders
from llava.checkpoints import Checkpoint
from llava.families import Family
from llava.generation import Generated, generate
from llava.heatmap import draw_prompt
from llava.machine import own_device, require_usable
from llava.measuring import measure
from llava.pixels import DECODER_ERRORS, as_seen, open_picture
from llava.records import Question, parse_question
from llava.regions import outlined
from llava.settings import AnswerSettings, ModelSettings

# Fields of a record that a call may have.
GIVEN = ("image_type", "target", "targets", "is_search", "target_box", "grid", "context", "points_elsewhere")


@dataclass(frozen=True, eq=False)
class Reply:
    """One answer, and where the model looked while giving it. Shares and ratios are in [0, 1]."""

    text: str
    target: int | None  # the image asked about, from 1; None: the prompt refers to none, or to several
    ratio: float | None  # R: attention on the targets by attention on all images, over answer tokens and layers
    ratio_by_layer: list[float] | None  # R of each measured layer
    shares: list[float] | None  # share of the image attention on each image, or cell of a collage
    confidence: float  # largest probability of the first answer token, before any steering
    perplexity: float | None  # of the answer's tokens, its end token included; None: sampled, or of several beams
    scale: float  # factor that the attention was steered by; 1: not steered
    is_complete: bool  # it ended by itself, before `max_new_tokens`
    # For each picture the `area` in px that its tokens cover, and the `mass` on it, row by row.
    maps: list[dict[str, Any]] | None = field(repr=False)
    pictures: list[Image.Image] = field(repr=False)  # upright RGB, as the model saw them
    question: Question = field(repr=False)
    record: dict[str, Any] = field(repr=False)  # the line of answers.jsonl
    generated: Generated = field(repr=False)  # masses by layer and region, and the answer's token ids

    def heatmap(self, height: int = 240) -> Image.Image:
        """All pictures side by side, `height` px high, under the attention on them; the targets are outlined."""
        boxes = outlined(self.question, self.pictures[0].size)
        return draw_prompt(self.pictures, self.maps, self.question.targets, boxes, height)


class VLM:
    """A loaded checkpoint of any family: `checkpoint`, `family` and `model` are there for what goes further."""

    def __init__(self, settings: ModelSettings, checkpoint: Checkpoint, model):
        self.settings, self.checkpoint, self.model = settings, checkpoint, model

    @classmethod
    def load(cls, settings: ModelSettings, checkpoint: Checkpoint, device: str | torch.device | None = None) -> "VLM":
        """Of what `settings` opened; `device` as in `open_model`."""
        require_usable(use_cpu=device is not None and torch.device(device).type == "cpu")
        return cls(
            settings, checkpoint, loaded(checkpoint, settings, own_device() if device is None else torch.device(device))
        )

    @property
    def family(self) -> Family:
        """The checkpoint's."""
        return self.checkpoint.family

    def ask(
        self, pictures: Sequence, prompt: str | Sequence[str], *, steer: str | AdaptViz | None = None, **more: Any
    ) -> Reply | list[Reply]:
        """Answer a prompt about pictures (PIL, or paths), or a list of prompts about a list of pictures each.

        A prompt without `<image>` gets its pictures before it, as our data has them. Which image it is about follows
        from its words ("In Image2, ...", "In Image1 and Image3, ..."), or is given as a record has it: `target` (from
        1) or `targets`, `is_search`, `image_type`, `grid`, `target_box`, `context`, `points_elsewhere`; with a list of
        prompts each of these is a list, too. Several pictures of which none is named are a `multi` prompt: shares, but
        no ratio.

        `steer` scales the attention by AdaptViz: "target", "all" or "balance" are the defaults of that scope, or give
        an `AdaptViz`. What else there is are the settings of inference: `max_new_tokens`, `temperature`, `num_beams`,
        `attention_layers`, ... Raises ValueError for a prompt, a picture or a setting that does not fit,
        FileNotFoundError, and TypeError for a setting that there is not.
        """
        job, is_many = self._job(pictures, prompt, more)
        rule = AdaptViz.from_dict({"scope": steer}) if isinstance(steer, str) else steer
        if rule is not None:
            rule.check(job)
        replies: dict[int, Reply] = {}
        is_sampled = job.settings.temperature > 0
        with torch.random.fork_rng(enabled=is_sampled):  # the caller's own stream goes on as if nothing had happened
            for start, numbers in enumerate(job.batches):
                if is_sampled:
                    torch.manual_seed(job.settings.seed + start)
                found = generate(
                    self.model, self.family, make_batch(job, numbers), job.layers, rule and rule.steer, job.selected,
                    **job.settings.generation,
                )  # fmt: skip
                replies |= {number: _reply(job, number, own) for number, own in zip(numbers, found, strict=True)}
        return [replies[number] for number in range(len(replies))] if is_many else replies[0]

    def look(
        self, pictures: Sequence, prompt: str | Sequence[str], answer: str | Sequence[str], **more: Any
    ) -> Reply | list[Reply]:
        """What `ask` measures, for an answer that is given: one pass over prompt and answer, and nothing generated.

        A list of prompts needs a list of answers. One prompt may have a list of them, too, which are measured in one
        pass. Raises like `ask`, and ValueError for an answer that holds a special token.
        """
        job, is_many = self._job(pictures, prompt, more)
        if not answer and not isinstance(answer, str):
            raise ValueError("no answer to look at")
        if not is_many:
            replies = self._look(job, 0, [answer] if isinstance(answer, str) else answer)
            return replies[0] if isinstance(answer, str) else replies
        if isinstance(answer, str) or len(answer) != len(job.questions):
            raise ValueError(f"{len(job.questions)} prompts need as many answers")
        return [self._look(job, number, [own])[0] for number, own in enumerate(answer)]

    def _look(self, job: Job, number: int, answers: Sequence[str]) -> list[Reply]:
        question = job.questions[number]
        tokens = [self.family.encode_answer(question.prompt, text.strip(), question.context) for text in answers]
        found = measure(self.model, self.family, make_batch(job, [number]), tokens, job.layers, job.selected)
        return [_reply(job, number, own) for own in found]

    def _job(self, pictures: Sequence, prompt: str | Sequence[str], more: dict[str, Any]) -> tuple[Job, bool]:
        """The job of a call, and whether it is about a list of prompts. Raises ValueError, FileNotFoundError."""
        is_many = not isinstance(prompt, str)
        columns = {"prompt": prompt, "pictures": pictures} | {name: more.pop(name) for name in GIVEN if name in more}
        columns = {name: list(value) if is_many else [value] for name, value in columns.items()}
        for name, values in columns.items():
            if len(values) != len(columns["prompt"]) or not values:
                raise ValueError(f"{name}: {len(values)} for {len(columns['prompt'])} prompts")
        store, questions = InMemory(), []
        for number in range(len(columns["prompt"])):
            raw = {name: values[number] for name, values in columns.items()}
            questions.append(_question(raw, store, f"prompt {number + 1}"))
        settings = AnswerSettings(**{"attention_maps": len(questions), **more})
        return job_of(self.checkpoint, self.settings, settings, questions, store), is_many


def open_model(path: str | Path, *, device: str | torch.device | None = None, **settings: Any) -> VLM:
    """A checkpoint or adapter of any family and dialect (folder or hub name), its weights loaded.

    `settings` are those of inference: `base_model`, `only_base_model`, `merge_adapter`, `max_image_tokens`,
    `batch_size`, `dtype`, ... `device`: None is the GPU of this process, or the CPU where there is none.
    Raises FileNotFoundError, ValueError.
    """
    own = ModelSettings(model_name_or_path=str(path), image_folder="", **settings)
    return VLM.load(own, own.open(), device)


class InMemory(dict[str, Image.Image]):
    """Pictures by name, as `Job.store` has them."""

    def open(self, name: str) -> Image.Image:
        """The picture, upright RGB."""
        return self[name]

    def size(self, name: str) -> tuple[int, int]:
        """Its (width, height) in px."""
        return self[name].size


def _question(raw: dict[str, Any], store: InMemory, where: str) -> Question:
    """The question of a call's record, its pictures put into the store. Raises ValueError, FileNotFoundError."""
    pictures, prompt = raw.pop("pictures"), raw["prompt"]
    if isinstance(pictures, str | Path | Image.Image):
        pictures = [pictures]  # one picture needs no list
    names = [f"{where}, picture {number}" for number in range(1, len(pictures) + 1)]
    store |= {name: _seen(picture, name) for name, picture in zip(names, pictures, strict=True)}
    raw = {name: list(value) if isinstance(value, tuple) else value for name, value in raw.items()}
    is_named = named_in(prompt) or raw.get("target") is not None or raw.get("targets") is not None
    if len(names) > 1 and not is_named:
        raw.setdefault("image_type", "multi")
    said = [prompt, *(str(message.get("content")) for message in raw.get("context") or () if isinstance(message, dict))]
    if prompt.strip() and not any(IMAGE in text for text in said):  # of an earlier turn the pictures stand there
        raw["prompt"] = placeholders("sequence" if len(names) > 1 else "single", len(names)) + prompt
    try:
        return parse_question({"id": where, "image": names, **raw}, where)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _seen(picture: Image.Image | str | Path, name: str) -> Image.Image:
    """A picture as training sees it. Raises ValueError, FileNotFoundError."""
    is_file = isinstance(picture, str | Path)
    if not is_file and not isinstance(picture, Image.Image):
        raise ValueError(f"{name}: a picture is a PIL picture or a path, not {type(picture).__name__}")
    if is_file and not Path(picture).is_file():
        raise FileNotFoundError(f"{name}: {picture}: no such file")
    try:
        return as_seen(open_picture(Path(picture)) if is_file else picture)
    except DECODER_ERRORS as error:
        raise ValueError(f"{name}: {picture if is_file else 'not a picture'}: {error}") from error


def _reply(job: Job, number: int, found: Generated) -> Reply:
    question, line = job.questions[number], record(job, number, found)
    del line["number"]
    return Reply(
        text=found.text, target=line["target"], ratio=line["attention_ratio"],
        ratio_by_layer=line["attention_ratio_by_layer"], shares=line["attention_by_image"],
        confidence=found.confidence, perplexity=found.perplexity, scale=found.factor, is_complete=found.is_complete,
        maps=line.get("attention_map"), pictures=[job.store.open(name) for name in question.images],
        question=question, record=line, generated=found,
    )  # fmt: skip
