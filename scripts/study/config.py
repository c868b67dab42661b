"""What a study compares, from one JSON file. Everything is checked before anything runs.

    {"base": MODEL, "data": {"file": PAIRS, "images": FOLDER}, "test": {"file": QUESTIONS, "images": FOLDER},
     "training": {FLAG: VALUE}, "answering": {FLAG: VALUE}, "seeds": [0, 1, 2],
     "arms": {"dpo": {"flags": {"attention_weight": 0}}, "ours": {"like": "dpo", "flags": {"attention_weight": 0.9}}}}

A path is looked for in the current folder, then in the repository; {output} is the study's folder, {own} the unit's.
`base`, the model as it is, is an arm of every study. `confirm` and `quick` are objects with changes of the rest, which
the flags of these names make; their `only` is a list of arms.
"""

import difflib
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from inference_optimization.llava_hound_dpo.run_adaptive import SteeringSettings
from inference_optimization.llava_hound_dpo.tune import GridSettings, TuneSettings
from llava.command_line import check, check_numbers
from llava.messages import one_line
from llava.run_folder import read_object
from llava.settings import AnswerSettings, ModelSettings, QuestionFiles
from llava.strict_json import check_text
from train.llava_hound_dpo import trainer_flags
from train.llava_hound_dpo.arguments import DataArguments, LossArguments, ModelArguments, TrainArguments

ROOT = Path(__file__).resolve().parents[2]
BASE = "base"
PLAIN = "plain"  # the pass without AdaptViz
REQUIRED = ("base", "data", "test", "training", "answering", "seeds", "arms")
RESERVED = ("train", "answers", "tune", "figures")  # folders of the study that no prepared one may be called
TUNE = "tune"  # in the flags of an AdaptViz pass: those of the tuner, whose settings the pass then takes
OURS = {"model_name_or_path", "data_path", "image_folder", "output", "output_dir"}  # flags that the study sets


def _is_word(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _is_command(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(shlex.split(value))
    except ValueError:  # a quotation without an end
        return False


def _are_seeds(value: Any) -> bool:
    is_list = isinstance(value, list) and all(type(seed) is int and 0 <= seed < 2**32 for seed in value)
    return is_list and 0 < len({*value}) == len(value)


# What the file may hold: an object by name, a list of one kind, or what a value must be and whether it is.
ANY = "*"  # every other name
TEXT = "a text", lambda value: isinstance(value, str) and bool(value.strip())
VALUE = "a text, a finite number, true, false, or a list of them", lambda value: all(
    map(_is_word, value if isinstance(value, list) else [value])
)
SEEDS = "a list of different whole numbers from 0 up to 2^32, at least one", _are_seeds
FLAGS, PATHS = {ANY: VALUE}, {"file": TEXT, "images": TEXT}
SHAPE = {
    "title": TEXT, "comment": VALUE, "base": TEXT, "data": PATHS, "test": PATHS, "validation": PATHS,
    "prepare": {ANY: [("a command", _is_command)]}, "training": FLAGS, "answering": FLAGS,
    "adaptviz": {ANY: {TUNE: FLAGS, ANY: VALUE}}, "seeds": SEEDS,
    "arms": {
        BASE: {"label": TEXT, "adaptviz": [TEXT]},
        ANY: {"like": TEXT, "label": TEXT, "data": PATHS, "seeds": SEEDS, "flags": FLAGS, "against": [TEXT],
              "adaptviz": [TEXT]},
    },
}  # fmt: skip
VARIANTS = ("confirm", "quick")  # entries with changes of the rest, in the order in which they are made
VARIANT = {"only": [TEXT], ANY: ("", lambda value: True)}  # the rest is looked at once it is merged


@dataclass(frozen=True)
class Data:
    """Records and their pictures: a folder, .zip or .tar."""

    file: str
    images: str


@dataclass(frozen=True)
class Arm:
    """One way of training. `like` in its entry names the arm whose flags, data and seeds it starts from."""

    name: str
    label: str
    data: Data | None  # None: not trained
    seeds: tuple[int, ...]
    flags: Mapping[str, Any] = field(default_factory=dict)  # of training, beside those that all arms share
    against: tuple[str, ...] = (BASE,)  # its controls
    adaptviz: tuple[str, ...] = ()  # also answered with these passes


@dataclass(frozen=True)
class Config:
    """A study. `raw` is the file as it was read, changed as asked for."""

    base: str
    test: Data
    validation: Data | None  # questions on which AdaptViz passes are tuned
    prepare: Mapping[str, Sequence[str]]  # by folder: commands that make what arms name; `torchrun -m`: on all GPUs
    training: Mapping[str, Any]
    answering: Mapping[str, Any]
    adaptviz: Mapping[str, Mapping[str, Any]]  # flags of each pass
    arms: Mapping[str, Arm]
    raw: Mapping[str, Any] = field(repr=False)


def read_config(path: Path, variants: Iterable[str] = (), only: Iterable[str] = ()) -> Config:
    """The study of a JSON file as its entries `variants` change it, with the arms `only` if there are any.

    Raises FileNotFoundError, ValueError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file; scripts/miniature/study.json is one")
    raw = read_object(path)
    try:
        check_text(raw)
        changes = {name: raw.pop(name) for name in VARIANTS if name in raw}
        _check_shape(changes, {ANY: VARIANT}, "")
        chosen: list[str] = []
        for name in variants:
            if name not in changes:
                raise ValueError(f"--{name}: the entry {name!r} is missing")
            chosen = changes[name].pop("only", chosen)
            raw = _merged(raw, changes[name])
        names, config = list(only) or chosen, parse_config(raw)
        _refuse_unknown(names, config.arms, "--only")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    kept = {name: arm for name, arm in config.arms.items() if not names or name in (BASE, *names)}
    return replace(config, arms=kept)


def _merged(old: Any, new: Any) -> Any:
    """`old` with the changes, object by object."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{name: _merged(old.get(name), value) for name, value in new.items()}}


def parse_config(raw: Mapping[str, Any]) -> Config:
    """The study of a JSON object. Raises ValueError for a wrong entry, FileNotFoundError for data that is not there."""
    _check_shape(raw, SHAPE, "")
    for name in REQUIRED:
        if name not in raw:
            raise ValueError(f"the entry {name!r} is missing")
    validation = _data(raw["validation"], "validation") if "validation" in raw else None
    config = Config(
        raw["base"], _data(raw["test"], "test"), validation, raw.get("prepare", {}), raw["training"], raw["answering"],
        raw.get("adaptviz", {}), _arms(raw), raw,
    )  # fmt: skip
    for name in (*config.prepare, *config.adaptviz, *config.arms):
        taken = (name in config.prepare and name in RESERVED) or (name in config.adaptviz and name == PLAIN)
        if taken or not re.fullmatch(r"\w[\w.-]{0,99}", name, re.ASCII):
            reserved = f"for prepared ones not {', '.join(RESERVED)}, for passes not {PLAIN}"
            raise ValueError(f"{name[:99]!r} names a folder: up to 100 letters, digits, . _ -; {reserved}")
    if config.validation is None and any(TUNE in flags for flags in config.adaptviz.values()):
        raise ValueError("adaptviz: a tuned pass needs `validation`, the questions to tune it on")
    for arm in config.arms.values():
        _check_arm(arm, config)
    _check_answering(config)
    is_tuned = any(TUNE in flags for flags in config.adaptviz.values())
    if is_tuned and located(config.validation.file) == located(config.test.file):
        raise ValueError("adaptviz: `validation` and `test` are the same questions; what tunes a pass cannot score it")
    return config


def _check_shape(value: Any, shape: Any, where: str) -> None:
    """Raises ValueError naming the entry that is not what it must be."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {one_line(json.dumps(value), 60)} must be an object, {{...}}")
        if ANY not in shape:
            _refuse_unknown(value, shape, where)
        for name, one in value.items():
            _check_shape(one, shape.get(name, shape.get(ANY)), f"{where}.{name}".lstrip("."))
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{where}: {one_line(json.dumps(value), 60)} must be a list, [...]")
        for number, one in enumerate(value):
            _check_shape(one, shape[0], f"{where}[{number}]")
    elif not shape[1](value):
        raise ValueError(f"{where}: {one_line(json.dumps(value), 60)} must be {shape[0]}")


def _data(raw: Mapping[str, str], where: str, start: Data | None = None) -> Data:
    """Raises FileNotFoundError for what is neither there nor made by the study."""
    found = replace(start or Data("", ""), **raw)
    for name, path in asdict(found).items():
        if not path:
            raise ValueError(f"{where}: the entry {name!r} is missing")
        if not path.startswith("{output}/") and not Path(located(path)).exists():
            raise FileNotFoundError(f"{where}.{name}: {path} is not there, and no path of the study's {{output}}/")
    return found


def located(text: str) -> str:
    """A relative path that is there in the current folder, else in the repository, as an absolute one; else the text.

    A word without a folder in it, as a flag's value may be, is never taken for a path, and a hub's name stays.
    """
    if "/" in text and not Path(text).is_absolute():
        return next((str(root / text) for root in (Path.cwd(), ROOT) if (root / text).exists()), text)
    return text


def _arms(raw: Mapping[str, Any]) -> dict[str, Arm]:
    """The arms, each after the one it is like, the base first.

    `against` and `adaptviz` are an arm's own; one that is like another is compared with that.
    """
    entries = dict(raw["arms"])
    own = entries.pop(BASE, {})
    base = Arm(BASE, own.get("label", BASE), None, (0,), against=(), adaptviz=tuple(own.get("adaptviz", ())))
    plain = Arm("", "", _data(raw["data"], "data"), tuple(raw["seeds"]))
    arms: dict[str, Arm] = {}
    for name, own in entries.items():
        where, like = f"arms.{name}", own.get("like")
        _refuse_unknown([like] if like else [], arms, f"{where}, an arm before")
        start = arms[like] if like else plain
        arm = Arm(
            name=name,
            label=own.get("label", name),
            data=_data(own["data"], f"{where}.data", start.data) if "data" in own else start.data,
            seeds=tuple(own.get("seeds", start.seeds)),
            flags={**start.flags, **own.get("flags", {})},
            against=tuple(own.get("against", [like or BASE])),
            adaptviz=tuple(own.get("adaptviz", ())),
        )
        for other in arms.values():
            if (arm.data, arm.seeds, arm.flags) == (other.data, other.seeds, other.flags):
                raise ValueError(f"{where}: trains as arms.{other.name}, with the same data, seeds and flags")
        arms[name] = arm
    return {BASE: base, **arms}


def _check_arm(arm: Arm, config: Config) -> None:
    """Raises ValueError for what it names that is not there, and for flags that training does not take."""
    _refuse_unknown(arm.against, config.arms.keys() - {arm.name}, f"arms.{arm.name}.against")
    _refuse_unknown(arm.adaptviz, config.adaptviz, f"arms.{arm.name}.adaptviz")
    if arm.data:
        where, groups = f"`training` and arms.{arm.name}.flags", (ModelArguments, DataArguments, LossArguments)
        _check_flags({**config.training, **arm.flags}, where, groups, (TrainArguments,))


def _check_answering(config: Config) -> None:
    """Raises ValueError for flags that the stages of answering do not take."""
    _check_flags(config.answering, "`answering`", (QuestionFiles, ModelSettings, AnswerSettings))
    for name, own in config.adaptviz.items():
        where, flags = f"`answering` and adaptviz.{name}", {**config.answering, **own}
        tuning = flags.pop(TUNE, {})
        _check_flags(flags, where, (QuestionFiles, SteeringSettings, ModelSettings, AnswerSettings))
        _check_flags({**config.answering, **tuning}, f"{where}.tune", (TuneSettings, ModelSettings, GridSettings))


def _check_flags(
    flags: Mapping[str, Any], where: str, groups: Sequence[type], trained: Sequence[type] = ()
) -> None:
    """Raises ValueError; of training, only ranges are looked at beside the names and types."""
    set_by_us = OURS | {"seed"} if trained else OURS
    needed = OURS - {"output" if trained else "output_dir"}
    try:
        for name in flags:
            if name.partition("=")[0].replace("-", "_") in set_by_us:
                raise ValueError(f"--{name} is for the study to set")
        found = check(groups, as_words({**flags, **dict.fromkeys(needed, "-")}), trained)
        if trained:
            check_numbers(found, **trainer_flags.RANGES)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def as_words(flags: Mapping[str, Any]) -> list[str]:
    """The flags as a command line has them; a list becomes several words."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list | tuple) else [str(value)])]
    return words


def _refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    known = sorted(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
            raise ValueError(f"{where}: unknown {name!r}; {hint}")
