"""What is run: units, each a folder with its commands and the units it is made from, planned from the config alone.

A unit's commands are scripts of the repository with their flags, so that each can be a job of a cluster. They name the
study's folder as {output}, so that a study may be moved.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.study.config import PLAIN, RESERVED, ROOT, TUNE, Arm, Config, Data, as_words, located

TRAIN = "train/llava_hound_dpo/train_dpo_multi_hpc_a100.sh"
ANSWER = "inference/llava_hound_dpo/my_inference_hpc.sh"
STEER = "inference_optimization/llava_hound_dpo/my_inference_adaptive.sh"
JOB = "scripts/study/job.sh"
TUNER = ("torchrun", "-m", "inference_optimization.llava_hound_dpo.tune")


@dataclass(frozen=True)
class Unit:
    """One folder of the study. A command's first word is a script of the repository."""

    name: str  # the folder, below the study's
    commands: tuple[tuple[str, ...], ...]
    identity: Mapping[str, Any]  # what decides its content, by names that say what differs
    inputs: tuple[str, ...] = ()  # names of units that must be finished before

    def words(self, output: Path) -> list[list[str]]:
        """The commands with all folders filled in."""
        return [[str(ROOT / words[0]), *(self._filled(word, output) for word in words[1:])] for words in self.commands]

    def _filled(self, word: str, output: Path) -> str:
        return located(word.replace("{own}", str(output / self.name)).replace("{output}", str(output)))


def plan(config: Config, base_digest: str) -> list[Unit]:
    """All units, inputs first: what is prepared, then arm by arm. `base_digest` stands for the base's weights.

    Raises ValueError for a folder of the study that nothing makes.
    """
    units: dict[str, Unit] = {}
    for unit in [*_prepared(config), *(unit for arm in config.arms.values() for unit in _of_arm(config, arm))]:
        text = " ".join(word for words in unit.commands for word in words)
        mentioned = dict.fromkeys(re.findall(r"\{output\}/([\w.-]+)/", text))
        for name in mentioned:
            if name not in (*units, *RESERVED, unit.name):
                raise ValueError(f"{unit.name} needs {{output}}/{name}/, which no entry of `prepare` before it makes")
        inputs = (*(name for name in config.prepare if name in mentioned and name != unit.name), *unit.inputs)
        made_from = {name: _digest(units[name].identity) for name in inputs}
        identity = {**unit.identity, "what is prepared or trained before": made_from, "the base's weights": base_digest}
        units[unit.name] = replace(unit, inputs=inputs, identity=identity)
    wanted: set[str] = set()
    for unit in reversed(units.values()):
        if unit.name not in config.prepare or unit.name in wanted:
            wanted |= {unit.name, *unit.inputs}
    return [unit for unit in units.values() if unit.name in wanted]


def train_name(arm: Arm, seed: int) -> str:
    """Folder of a trained model."""
    return f"train/{arm.name}/seed_{seed}"


def answer_name(arm: Arm, seed: int, way: str) -> str:
    """Folder of answers.jsonl; `way` is PLAIN or an AdaptViz pass."""
    return f"answers/{arm.name}/seed_{seed}/{way}"


def _prepared(config: Config) -> Iterable[Unit]:
    for name, texts in config.prepare.items():
        commands = tuple((JOB, *shlex.split(text)) for text in texts)
        yield Unit(name, commands, {f"command {number}": text for number, text in enumerate(texts, 1)})


def _of_arm(config: Config, arm: Arm) -> Iterable[Unit]:
    for seed in arm.seeds:
        model, trained = config.base, ()
        if arm.data:
            trained = (train_name(arm, seed),)
            model = f"{{output}}/{trained[0]}/adapter"
            yield _unit(trained[0], (TRAIN,), {
                "model_name_or_path": config.base, "data_path": arm.data.file, "image_folder": arm.data.images,
                "output_dir": "{own}/adapter", "report_to": "none", **config.training, **arm.flags, "seed": seed,
            })  # fmt: skip
        for way in (PLAIN, *arm.adaptviz):
            yield from _answers(config, arm, seed, way, model, trained)


def _answers(
    config: Config, arm: Arm, seed: int, way: str, model: str, trained: tuple[str, ...]
) -> Iterable[Unit]:
    """The test questions answered in one way; before, if the way is tuned, its settings, chosen with the first seed."""

    def asking(data: Data, **flags: Any) -> dict[str, Any]:
        asked = {"model_name_or_path": model, "data_path": data.file, "image_folder": data.images}
        return {**asked, **config.answering, **flags}

    own = {} if way == PLAIN else dict(config.adaptviz[way])
    tuning, inputs = own.pop(TUNE, None), trained
    if tuning is not None:
        tuned = f"tune/{arm.name}/{way}"
        if seed == arm.seeds[0]:
            yield _unit(tuned, (JOB, *TUNER), asking(config.validation, output="{own}", **tuning), trained)
        own["config"], inputs = f"{{output}}/{tuned}/tuned.json", (*trained, tuned)
    flags = asking(config.test, output="{own}/answers.jsonl", **own)
    yield _unit(answer_name(arm, seed, way), (ANSWER if way == PLAIN else STEER,), flags, inputs)


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _unit(name: str, script: Sequence[str], flags: Mapping[str, Any], inputs: tuple[str, ...] = ()) -> Unit:
    return Unit(name, ((*script, *as_words(flags)),), flags, inputs)
