"""Does a model answer elsewhere as here? `python -m scripts.prove --model MODEL --questions Q --image_folder I`.

The same prompts go through this repository, through plain transformers with the exported folder, and with `--endpoint`
through a running OpenAI-compatible server of that folder. Exit code 0 if all answers are the same, 1 if not, 2 for
errors.
"""

import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForImageTextToText, LogitsProcessor
from transformers.utils import is_torchvision_available

from llava.answering import Job, batches_of, prepare, spread
from llava.checkpoints import WHOLE
from llava.command_line import check_numbers, flag, parse
from llava.elsewhere import Said, ServerSettings, ask_server
from llava.endpoint import Endpoint
from llava.generation import generate
from llava.machine import own_device
from llava.records import read_prompts
from llava.runtime import Progress, setup_logging, user_errors, write_text
from llava.settings import AnswerSettings, ModelSettings
from scripts.export import DTYPES, Asked, asked_of, export, next_logits, plain_inputs, plain_processor

logger = logging.getLogger("scripts.prove")

FEW = 8  # prompts that a new export is compared on, before all of them are
PLAIN, PILLOW = "plain transformers", "plain transformers, pictures resampled by pillow as here"


@dataclass(kw_only=True)
class ProveSettings(ServerSettings):
    """Which model is proved, on what, against which server."""

    _argument_group_name, _inherited_group_name = "proof", "server"

    model: str = flag("adapter or checkpoint of any dialect, or an exported folder")
    questions: Path = flag("prompts: a test set or pairs")
    image_folder: str = flag("folder, .zip or .tar of their pictures")
    base_model: str | None = flag("what an adapter stands on, instead of the base it names", None)
    image_tower: str | None = flag("vision tower of an original checkpoint", None)
    num: int = flag("prompts, taken in turn from every format", 100)
    dtype: str = flag("precision of ours and of plain transformers", "float32", choices=list(DTYPES))
    max_new_tokens: int = flag("tokens of an answer at most", 128)
    batch_size: int = flag("prompts per batch, of ours; plain transformers and servers get one at a time", 8)
    output: Path | None = flag("file to write all answers to, as JSON lines", None)

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, num=(1, None), batch_size=(1, None), max_new_tokens=(1, None))

    def job(self) -> Job:
        """The prompts, checked. Raises like `prepare`."""
        model = ModelSettings(
            model_name_or_path=self.model, base_model=self.base_model, image_tower=self.image_tower,
            image_folder=self.image_folder, batch_size=self.batch_size, dtype=self.dtype, num_workers=0,
            merge_adapter="False",  # the other side is the merged one
        )  # fmt: skip
        settings = AnswerSettings(attention_layers="none", max_new_tokens=self.max_new_tokens)
        questions = read_prompts(self.questions)
        return prepare(model, settings, [questions[number] for number in sorted(spread(questions, self.num))])


@dataclass(frozen=True)
class Given:
    """One answer."""

    text: str
    tokens: list[int] | None = None  # None: a server tells the text alone ...
    first: Tensor | None = None  # (V,) ... and not the probabilities of its first token


@dataclass(frozen=True)
class Difference:
    """Where two answers to one prompt part, and how likely our model thinks either token is there."""

    id: str
    place: int  # 0-based token of the answer
    ours: str
    ours_probability: float
    theirs: str
    theirs_probability: float

    def __str__(self) -> str:
        return (
            f"{self.id}: token {self.place + 1} is {self.ours!r} ({self.ours_probability:.4f}) here, {self.theirs!r} "
            f"({self.theirs_probability:.4f}) there"
        )


def main() -> int:
    """Ask all of them, compare, report; the exit code."""
    setup_logging()
    with user_errors(), tempfile.TemporaryDirectory() as temporary:
        (own,) = parse((ProveSettings,), __doc__)
        job = own.job()
        endpoint = own.open(own.model, job.settings)
        asked = [asked_of(job.family, q, [job.store.open(name) for name in q.images]) for q in job.questions]
        served = ask_there(endpoint, job, own.endpoint_workers) if endpoint else None
        folder = exported(own, job, asked, Path(temporary) / "exported")
        given = {"this repository": ask_here(job), PLAIN: ask_plain(folder, asked, own)}
        differs = any(a.text != b.text for a, b in zip(*given.values(), strict=True))
        if differs and is_torchvision_available():  # else it has resampled by pillow
            given[PILLOW] = ask_plain(folder, asked, own, by_pillow=True)
        if served:
            given[f"the server at {own.endpoint}"] = served
        return report(job, given, own.output)


# ---- three ways to ask


class FirstToken(LogitsProcessor):
    """Notes the probabilities of the first token of every answer."""

    def __init__(self):
        self.probabilities: Tensor | None = None  # (B, V)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as they are."""
        if self.probabilities is None:
            self.probabilities = scores.float().softmax(dim=-1).cpu()
        return scores


def ask_here(job: Job) -> list[Given]:
    """Our inference, in its batches."""
    found: dict[int, Given] = {}
    for model, numbers, batch in batches_of(job, range(len(job.batches))):
        first = FirstToken()
        answers = generate(model, job.family, batch, [], logits_processor=[first], **job.settings.generation)
        for number, answer, own in zip(numbers, answers, first.probabilities, strict=True):
            found[number] = Given(answer.text, answer.tokens, own)
    return [found[number] for number in range(len(job.questions))]


def ask_plain(folder: Path | str, asked: Sequence[Asked], own: ProveSettings, by_pillow: bool = False) -> list[Given]:
    """transformers alone: its processor, the folder's chat template, `generate`.

    `by_pillow`: it resamples pictures as training does, not by torchvision.
    """
    processor = plain_processor(folder, by_pillow)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=own.dtype, trust_remote_code=False)
    model.eval().to(own_device())
    found = []
    for one in Progress(asked, desc="plain transformers", unit="answer"):
        inputs, first = plain_inputs(processor, one.turns, one.pictures).to(model.device, model.dtype), FirstToken()
        whole = model.generate(
            **inputs, do_sample=False, num_beams=1, repetition_penalty=1.0, max_new_tokens=own.max_new_tokens,
            logits_processor=[first],
        )  # fmt: skip
        tokens = whole[0, inputs["input_ids"].shape[1] :].tolist()
        text = processor.decode(tokens, skip_special_tokens=True)
        found.append(Given(text.strip(), tokens, first.probabilities[0]))
    return found


def ask_there(endpoint: Endpoint, job: Job, workers: int) -> list[Given]:
    """A server. Raises EndpointError; ValueError where it gives no answer."""
    found: dict[int, Given] = {}

    def keep(number: int, said: Said) -> None:
        found[number] = Given(said[0])

    numbers = range(len(job.questions))
    ask_server(endpoint, job, numbers, workers, keep)
    if missing := [job.questions[number].where for number in numbers if number not in found]:
        raise ValueError(f"{endpoint.url}: no answer to {len(missing)} prompts, {missing[0]} first: is it well?")
    return [found[number] for number in numbers]


def exported(own: ProveSettings, job: Job, asked: Sequence[Asked], folder: Path) -> str:
    """MODEL if it is an export, else a new one."""
    template = Path(own.model) / "chat_template.jinja"
    is_whole = job.checkpoint.dialect == WHOLE and template.is_file()
    if is_whole and template.read_text(encoding="utf-8") == job.family.chat_template:
        return own.model
    logger.info("exporting %s first", job.checkpoint)
    export(job.checkpoint, folder, own.dtype, "hf", asked[:FEW])
    return str(folder)


# ---- what comes out


def report(job: Job, given: dict[str, list[Given]], output: Path | None) -> int:
    """Say how many answers are the same, and of the others where they part; 0 if there are none of these, else 1."""
    (_, ours), *others = given.items()
    differences = {name: differing(job, ours, theirs) for name, theirs in others}
    for name, theirs in others:
        found = differences[name]
        logger.info("%s: %d of %d answers are the same", name, len(ours) - len(found), len(ours))
        if theirs[0].first is not None:
            pairs = zip(ours, theirs, strict=True)
            largest = max((a.first - b.first).abs().max().item() for a, b in pairs)
            logger.info("  largest difference of a first token's probability: %.1e", largest)
        for difference in found:
            logger.info("  %s", difference)
    if output:
        write_text(output, "".join(lines(job, given, differences)))
    return 1 if any(differences.values()) else 0


def lines(job: Job, given: dict[str, list[Given]], differences: dict[str, list[Difference]]):
    """A JSON line for every prompt: all answers, and where they part."""
    for number, question in enumerate(job.questions):
        answers = {name: own[number].text for name, own in given.items()}
        parts = {name: asdict(d) for name, own in differences.items() for d in own if d.id == question.id}
        yield json.dumps({"question_id": question.id, "answers": answers, "differences": parts}) + "\n"


def differing(job: Job, ours: Sequence[Given], theirs: Sequence[Given]) -> list[Difference]:
    """Where the answers part that are not the same, with what our model says of both tokens there."""
    numbers = [n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a.text != b.text]
    if not numbers:
        return []
    model = job.checkpoint.load(job.model.torch_dtype).eval().to(own_device())
    return [_difference(job, model, number, ours[number], theirs[number]) for number in numbers]


def _difference(job: Job, model, number: int, ours: Given, theirs: Given) -> Difference:
    family, question = job.family, job.questions[number]
    one = asked_of(family, question, [job.store.open(name) for name in question.images])
    a, b = ours.tokens, theirs.tokens or family.encode_answer(question.prompt, theirs.text, question.context)
    place = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)) - 1)
    probabilities = next_logits(model, family, one, a[:place]).float().softmax(dim=-1)
    words = [family.tokenizer.decode([token], skip_special_tokens=False) for token in (a[place], b[place])]
    return Difference(
        question.id, place, words[0], probabilities[a[place]].item(), words[1], probabilities[b[place]].item()
    )


if __name__ == "__main__":
    sys.exit(main())
