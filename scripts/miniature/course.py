"""Stages of a training that can be killed at any time and goes on, with the same numbers, where it was last saved."""

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from llava.runtime import write_bytes

logger = logging.getLogger("scripts.miniature.course")

SAVE_EVERY = 50  # steps
WARMUP = 0.05  # share of a stage's steps over which the rate rises
COOLDOWN = 0.25  # share over which it falls again
WEIGHT_DECAY, MAX_GRAD_NORM = 0.01, 1.0


@dataclass(frozen=True)
class Stage:
    """Steps of one kind. `lesson` gives the loss of a step and what the progress bar shows of it."""

    name: str
    steps: int  # at most
    rate: float
    trained: Sequence[nn.Parameter]
    head: nn.Module | None  # learns with the model and is thrown away
    lesson: Callable[[], tuple[Tensor, dict[str, str]]]
    is_over: Callable[[int], bool] = lambda step: False


@dataclass
class Course:
    """A model, the random numbers of its lessons, and the file that holds how far both have come."""

    model: nn.Module
    rng: np.random.Generator
    file: Path
    identity: dict  # of the recipe: another one's file is refused
    finished: dict[str, int] = field(default_factory=dict)  # steps by stage
    _unread: dict | None = None  # state inside a stage

    def open(self) -> None:
        """Takes up the file's state, if there is one. Raises ValueError if it is of another recipe."""
        if not self.file.is_file():
            return
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        if json.loads(state["identity"]) != json.loads(json.dumps(self.identity)):
            raise ValueError(f"{self.file} is of another recipe or seed: choose another --output, or remove it")
        self.model.load_state_dict(state["model"])
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.finished, self._unread = state["finished"], state["inside"]

    def run(self, stage: Stage) -> None:
        """All steps of a stage that are not done yet."""
        if stage.name in self.finished:
            return
        parameters = [*stage.trained, *(stage.head.parameters() if stage.head else ())]
        optimizer, schedule = optimizer_for(parameters, stage.rate, stage.steps)
        start = self._restore(stage, optimizer, schedule)
        progress = tqdm(range(start + 1, stage.steps + 1), desc=stage.name, initial=start, total=stage.steps)
        for step in progress:
            loss, shown = stage.lesson()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            progress.set_postfix(loss=f"{loss.item():.2f}", **shown)
            if stage.is_over(step):
                break
            if step % SAVE_EVERY == 0 and step < stage.steps:
                parts = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
                head = stage.head.state_dict() if stage.head else {}
                self._save({"stage": stage.name, "step": step, "head": head, **parts})
        self.finished[stage.name] = step
        self._save(None)

    def _restore(self, stage: Stage, optimizer, schedule) -> int:
        inside, self._unread = self._unread, None
        if inside is None:
            return 0
        optimizer.load_state_dict(inside["optimizer"])
        schedule.load_state_dict(inside["schedule"])
        if stage.head:
            stage.head.load_state_dict(inside["head"])
        return inside["step"]

    def _save(self, inside: dict | None) -> None:
        state = {
            "identity": json.dumps(self.identity), "model": self.model.state_dict(), "finished": self.finished,
            "rng": json.dumps(self.rng.bit_generator.state), "inside": inside,
        }  # fmt: skip
        content = io.BytesIO()
        torch.save(state, content)
        write_bytes(self.file, content.getvalue())


def until(recipe: Mapping, accuracy: Callable[[], float]) -> Callable[[int], bool]:
    """Whether a stage may end at a step: every `check_every` steps, if the check gives the `wanted` %."""

    def is_over(step: int) -> bool:
        if step % recipe["check_every"]:
            return False
        found = accuracy()
        logger.info("step %d: %.1f %% of the held-out prompts are right, %.1f wanted", step, found, recipe["wanted"])
        return found >= recipe["wanted"]

    return is_over


def optimizer_for(parameters: Sequence[nn.Parameter], rate: float, steps: int):
    """AdamW and its schedule: a short rise, a long plateau (routing forms at the full rate or not), a linear fall."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    rise, fall = max(1, round(WARMUP * steps)), max(1, round(COOLDOWN * steps))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / rise, max(0.02, (steps - step) / fall))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
