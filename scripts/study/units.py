"""What is run: units, each a folder with its commands and the units it is made from, planned from the config alone.

A unit's commands are scripts of the repository with their flags, so that each can be a job of a cluster. They name the
study's folder as {output}, so that a study may be moved.
"""

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.study.config import ROOT, TUNE, Arm, Config, as_words, located

TRAIN = "train/llava_hound_dpo/train_dpo_multi_hpc_a100.sh"
ANSWER = "inference/llava_hound_dpo/my_inference_hpc.sh"
STEER = "inference_optimization/llava_hound_dpo/my_inference_adaptive.sh"
JOB = "scripts/study/job.sh"
TUNER = ("python", "-m", "inference_optimization.llava_hound_dpo.tune")
PLAIN = "plain"  # the pass without AdaptViz


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
    """All units, inputs first: what is prepared, then arm by arm. `base_digest` stands for the base's weights."""
    units: dict[str, Unit] = {}
    for unit in [*_prepared(config), *(unit for arm in config.arms.values() for unit in _of_arm(config, arm))]:
        mentioned = [name for name in config.prepare if name != unit.name
                     and any(f"{{output}}/{name}/" in word for words in unit.commands for word in words)]  # fmt: skip
        inputs = (*mentioned, *unit.inputs)
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
        if arm.data:
            yield _train(config, arm, seed)
        yield _answer(config, arm, seed, PLAIN)
        for way in arm.adaptviz:
            if TUNE in config.adaptviz[way] and seed == arm.seeds[0]:
                yield _tune(config, arm, way)
            yield _answer(config, arm, seed, way)


def _train(config: Config, arm: Arm, seed: int) -> Unit:
    flags = {
        "model_name_or_path": config.base, "data_path": arm.data.file, "image_folder": arm.data.images,
        "output_dir": "{own}/adapter", "report_to": "none", **config.training, **arm.flags, "seed": seed,
    }  # fmt: skip
    return _unit(train_name(arm, seed), (TRAIN,), flags)


def _answer(config: Config, arm: Arm, seed: int, way: str) -> Unit:
    flags, inputs = _asking(config, arm, seed, config.test.file, config.test.images)
    flags["output"] = "{own}/answers.jsonl"
    if way == PLAIN:
        return _unit(answer_name(arm, seed, way), (ANSWER,), flags, inputs)
    own = dict(config.adaptviz[way])
    if own.pop(TUNE, None) is not None:
        own["config"], inputs = f"{{output}}/{_tune_name(arm, way)}/tuned.json", (*inputs, _tune_name(arm, way))
    return _unit(answer_name(arm, seed, way), (STEER,), {**flags, **own}, inputs)


def _tune(config: Config, arm: Arm, way: str) -> Unit:
    """AdaptViz's settings for the arm, chosen with its first seed."""
    flags, inputs = _asking(config, arm, arm.seeds[0], config.validation.file, config.validation.images)
    flags |= {"output": "{own}", **config.adaptviz[way][TUNE]}
    return _unit(_tune_name(arm, way), (JOB, *TUNER), flags, inputs)


def _tune_name(arm: Arm, way: str) -> str:
    return f"tune/{arm.name}/{way}"


def _asking(config: Config, arm: Arm, seed: int, file: str, images: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Flags of a stage that asks an arm's model, and the units that the model needs."""
    model = f"{{output}}/{train_name(arm, seed)}/adapter" if arm.data else config.base
    flags = {"model_name_or_path": model, "data_path": file, "image_folder": images, **config.answering}
    return flags, (train_name(arm, seed),) if arm.data else ()


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _unit(name: str, script: Sequence[str], flags: Mapping[str, Any], inputs: tuple[str, ...] = ()) -> Unit:
    return Unit(name, ((*script, *as_words(flags)),), flags, inputs)
