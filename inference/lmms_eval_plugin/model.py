"""The model class that lmms-eval loads by the name `attention_aware`."""

import inspect
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger
from PIL import Image

from inference.lmms_eval_plugin.requests import KNOWN, cut, measures_of, region_fields, settings_of
from llava import open_model
from llava.adaptviz import SCOPES, AdaptViz, read_config
from llava.regions import UNPOINTED
from llava.runtime import Progress, stop, user_errors
from llava.settings import ModelSettings
from llava.vlm import Reply

AT_ONCE = 8  # batches whose pictures are in memory, so that prompts of like length share a batch


class Measured(TokenCounts):
    """What lmms-eval writes under `token_counts` of a logged sample: the one place that takes more than a text."""

    def __init__(self, reply: Reply):
        super().__init__(output_tokens=reply.record["num_tokens"])
        self.measures = measures_of(reply.record)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return super().to_dict() | self.measures


class AttentionAware(lmms):
    """Answers requests of lmms-eval through `open_model(...).ask(...)`.

    `pretrained` is a checkpoint or adapter, `adapter` stands on it; `steer`: target, balance, all, or a file of `tune`.
    What else --model_args may hold are the settings of `open_model` (dtype=float32, merge_adapter=False, ...).
    """

    def __init__(
        self, pretrained: str, adapter: str | None = None, steer: str | None = None, batch_size: int | str = 1,
        device: str | None = None, max_batch_size: Any = None, **settings: Any,
    ):  # fmt: skip
        super().__init__()
        with user_errors():
            if not str(batch_size).isdigit():
                raise ValueError(f"--batch_size {batch_size}: give a number; this model does not look for one")
            unknown = settings.keys() - inspect.signature(ModelSettings).parameters.keys()
            if unknown:
                raise ValueError(f"--model_args {min(unknown)}: no such setting of attention_aware")
            self.batch_size, self.steer = int(batch_size), steering(steer)
            self.accelerator = Accelerator()  # it starts the process group, which the evaluator needs from here on
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            if adapter:
                settings["base_model"] = pretrained
            self.vlm = open_model(adapter or pretrained, device=device, batch_size=self.batch_size, **settings)

    @property
    def device(self):
        """Where the evaluator puts what processes exchange."""
        return self.accelerator.device

    def clean(self) -> None:
        """Give the weights' memory to whoever judges the answers."""
        del self.vlm
        super().clean()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """An answer to each request, its measures with it."""
        self._say_unused(requests)
        found: dict[int, GenerationResult] = {}
        with Progress(total=len(requests), desc="answers", unit="answer", disable=self.rank != 0) as bar:
            for numbers in self._chunks(requests):
                own = [requests[number] for number in numbers]
                for number, reply in zip(numbers, self._ask(own, seed=numbers[0]), strict=True):
                    text = cut(reply.text, requests[number].args[1].get("until"))
                    found[number] = GenerationResult(text, Measured(reply))
                bar.update(len(numbers))
        return [found[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Mean -log p of a token of each given answer, end token included, and whether it is what the model says.

        Not a sum of log p: lmms-eval takes the smallest value as the likeliest answer, and its models give this. Nor a
        bare pair, which 0.7.3 makes a text of that it then cannot read (`unwrap_generation_output`).
        """
        if self.steer:
            stop("tasks that compare likelihoods of given answers are not steered: leave `steer` out of --model_args")
        own = (list(same) for _, same in groupby(requests, key=lambda request: (request.args[0], *request.args[3:])))
        return [found for same in own for found in self._likelihoods(same)]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refused: a question is asked once."""
        stop("attention_aware answers one prompt at a time: it runs no tasks of several rounds")

    def _say_unused(self, requests: Sequence[Instance]) -> None:
        unused = sorted({name for request in requests for name in request.args[1]} - KNOWN)
        if unused and self.rank == 0:
            logger.warning(f"attention_aware does not use the generation arguments {', '.join(unused)}")

    def _chunks(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Numbers of requests with the same settings, as many as are asked at once."""
        settings = [repr(settings_of(request.args[1])) for request in requests]
        order = sorted(range(len(requests)), key=settings.__getitem__)
        size = AT_ONCE * self.batch_size
        for _, same in groupby(order, key=settings.__getitem__):
            numbers = list(same)
            yield from (numbers[start : start + size] for start in range(0, len(numbers), size))

    def _ask(self, requests: Sequence[Instance], seed: int) -> list[Reply]:
        """Replies to requests of the same settings. A prompt that points at nothing is answered without steering."""
        prompts = [self._prompt(request) for request in requests]
        settings = settings_of(requests[0].args[1]) | {"seed": seed, "attention_maps": 0}
        is_all = self.steer is not None and self.steer.scope == "all"
        steered = [is_all or prompt["image_type"] not in UNPOINTED for prompt in prompts]
        replies: dict[int, Reply] = {}
        for steer, wanted in ((self.steer, True), (None, False)):
            own = [number for number, is_steered in enumerate(steered) if is_steered == wanted]
            columns = {name: [prompts[number][name] for number in own] for name in prompts[0]}
            with told([requests[number] for number in own]):
                replies |= zip(own, self.vlm.ask(**columns, steer=steer, **settings) if own else (), strict=True)
        return [replies[number] for number in range(len(requests))]

    def _likelihoods(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Of given answers to one prompt, in one pass."""
        prompt = self._prompt(requests[0]) | {"attention_maps": 0}
        with told(requests):
            looks = self.vlm.look(**prompt, answer=[self._continuation(request) for request in requests])
            longest = max(len(look.generated.tokens) for look in looks)
            own = self.vlm.ask(**prompt, attention_layers="none", max_new_tokens=longest).generated.tokens
        pairs = [(math.log(look.perplexity), look.generated.tokens == own) for look in looks]
        return [GenerationResult(pair, Measured(look)) for pair, look in zip(pairs, looks, strict=True)]

    def _continuation(self, request: Instance) -> str:
        given = request.args[1]
        return given if isinstance(given, str) else given(self._document(request))

    def _document(self, request: Instance) -> dict[str, Any]:
        *_, number, task, split = request.args
        return self.task_dict[task][split][number]

    def _prompt(self, request: Instance) -> dict[str, Any]:
        """Pictures, prompt and format of a request."""
        context, _, pictures_of = request.args[:3]
        pictures = list(pictures_of(self._document(request)) or ())
        with told([request]):
            if not pictures or not all(isinstance(picture, Image.Image) for picture in pictures):
                raise ValueError(f"attention_aware is asked about pictures, and these are {pictures!r}")
            sizes = [picture.size for picture in pictures]
            return {"pictures": pictures, "prompt": context, **region_fields(context, sizes)}


def steering(name: str | None) -> AdaptViz | None:
    """The defaults of a scope, or what a file of `tune` says. Raises ValueError."""
    if name is None or name in SCOPES:
        return name and AdaptViz.from_dict({"scope": name})
    if not Path(name).is_file():
        raise ValueError(f"--model_args steer={name}: neither one of {', '.join(SCOPES)} nor a file that `tune` wrote")
    return read_config(Path(name))


@contextmanager
def told(requests: Sequence[Instance]) -> Iterator[None]:
    """End with one line that names the document whose prompt is refused."""
    try:
        yield
    except ValueError as error:
        number = re.match(r"prompt (\d+)", str(error))  # as `ask` calls those of a list
        *_, document, task, _ = requests[int(number[1]) - 1 if number else 0].args
        stop(f"document {document} of task {task}: {error}", from_any_process=True)
