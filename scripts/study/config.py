"""What a study compares, from one JSON file. Everything is checked before anything runs.

    {"base": MODEL, "data": {"file": PAIRS, "images": FOLDER}, "test": {"file": QUESTIONS, "images": FOLDER},
     "training": {FLAG: VALUE}, "answering": {FLAG: VALUE}, "seeds": [0, 1, 2],
     "arms": {"dpo": {"flags": {"attention_weight": 0}}, "ours": {"like": "dpo", "flags": {"attention_weight": 0.9}}}}

A path is looked for in the current folder, then in the repository; {output} is the study's folder, {own} the unit's.
`base`, the model as it is, is an arm of every study.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llava.command_line import check
from llava.run_folder import read_object
from train.llava_hound_dpo.arguments import DataArguments, LossArguments, ModelArguments, TrainArguments

ROOT = Path(__file__).resolve().parents[2]
BASE = "base"
REQUIRED = ("base", "data", "test", "training", "answering", "seeds", "arms")
OPTIONAL = ("title", "comment", "validation", "prepare", "adaptviz", "quick")
RESERVED = ("train", "answers", "tune", "figures")  # folders of the study that no prepared one may be called
TUNE = "tune"  # in the flags of an AdaptViz pass: those of the tuner, whose settings the pass then takes


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
    """A study. `raw` is the file as it was read, the quick sizes applied."""

    base: str
    test: Data
    validation: Data | None  # questions on which AdaptViz passes are tuned
    prepare: Mapping[str, Sequence[str]]  # by folder: commands that make data, or whatever else arms name
    training: Mapping[str, Any]
    answering: Mapping[str, Any]
    adaptviz: Mapping[str, Mapping[str, Any]]  # flags of each pass
    arms: Mapping[str, Arm]
    raw: Mapping[str, Any] = field(repr=False)


def read_config(path: Path, is_quick: bool = False, only: Iterable[str] = ()) -> Config:
    """The study of a JSON file, with the arms `only` if there are any. Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file; scripts/miniature/study.json is one")
    raw = read_object(path)
    try:
        quick = dict(raw.pop("quick", {}))
        names = list(only) or quick.pop("only", []) if is_quick else list(only)
        config = parse_config(_merged(raw, quick) if is_quick else raw)
        _refuse_unknown(names, config.arms, "--only")
    except KeyError as error:
        raise ValueError(f"{path}: the entry {error} is missing") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    kept = {name: arm for name, arm in config.arms.items() if not names or name in (BASE, *names)}
    return replace(config, arms=kept)


def _merged(old: Any, new: Any) -> Any:
    """`old` with the changes, object by object."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{name: _merged(old.get(name), value) for name, value in new.items()}}


def parse_config(raw: Mapping[str, Any]) -> Config:
    """The study of a JSON object. Raises KeyError for a missing entry, ValueError for a wrong one."""
    _refuse_unknown(raw, (*REQUIRED, *OPTIONAL), "the file")
    for name in REQUIRED:
        raw[name]
    for name in ("training", "answering", "arms", "adaptviz", "prepare"):
        if not isinstance(raw.get(name, {}), dict):
            raise ValueError(f"`{name}` must be an object")
    if not isinstance(raw["base"], str):
        raise ValueError("`base` must be the folder or hub name of a model")
    for name, flags in raw.get("adaptviz", {}).items():
        if not isinstance(flags, dict) or not isinstance(flags.get(TUNE, {}), dict):
            raise ValueError(f"adaptviz.{name} must be an object, and so must its `{TUNE}`")
    validation = _data(raw["validation"], "validation") if "validation" in raw else None
    config = Config(
        raw["base"], _data(raw["test"], "test"), validation, raw.get("prepare", {}), raw["training"], raw["answering"],
        raw.get("adaptviz", {}), _arms(raw), raw,
    )  # fmt: skip
    for name in (*config.prepare, *config.adaptviz, *config.arms):
        if not re.fullmatch(r"[\w.-]+", name) or (name in config.prepare and name in RESERVED):
            raise ValueError(f"{name!r} names a folder: letters, digits, . _ -, and prepared ones not {RESERVED}")
    if config.validation is None and any(TUNE in flags for flags in config.adaptviz.values()):
        raise ValueError("adaptviz: a tuned pass needs `validation`, the questions to tune it on")
    for arm in config.arms.values():
        _check_arm(arm, config)
    return config


def _data(raw: Mapping[str, Any], where: str, start: Data | None = None) -> Data:
    """Raises FileNotFoundError for what is neither there nor made by the study."""
    _refuse_unknown(raw, ("file", "images"), where)
    found = replace(start, **raw) if start else Data(raw["file"], raw["images"])
    for name, path in asdict(found).items():
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
    _refuse_unknown(own, ("label", "adaptviz"), f"arms.{BASE}")
    base = Arm(BASE, own.get("label", BASE), None, (0,), against=(), adaptviz=tuple(own.get("adaptviz", ())))
    plain = Arm("", "", _data(raw["data"], "data"), _seeds(raw["seeds"], "seeds"))
    arms = {}
    for name, own in entries.items():
        where, like = f"arms.{name}", own.get("like")
        _refuse_unknown(own, (*Arm.__dataclass_fields__.keys() - {"name"}, "like"), where)
        _refuse_unknown([like] if like else [], arms, f"{where}, an arm before")
        start = arms[like] if like else plain
        arms[name] = Arm(
            name=name,
            label=own.get("label", name),
            data=_data(own["data"], f"{where}.data", start.data) if "data" in own else start.data,
            seeds=_seeds(own["seeds"], f"{where}.seeds") if "seeds" in own else start.seeds,
            flags={**start.flags, **own.get("flags", {})},
            against=tuple(own.get("against", [like or BASE])),
            adaptviz=tuple(own.get("adaptviz", ())),
        )
    return {BASE: base, **arms}


def _seeds(raw: Any, where: str) -> tuple[int, ...]:
    if not (isinstance(raw, list) and raw and all(type(seed) is int for seed in raw) and len({*raw}) == len(raw)):
        raise ValueError(f"{where}: {json.dumps(raw)} must be a list of different whole numbers, at least one")
    return tuple(raw)


def _check_arm(arm: Arm, config: Config) -> None:
    """Raises ValueError for what it names that is not there, and for flags that training does not take."""
    _refuse_unknown(arm.against, config.arms, f"arms.{arm.name}.against")
    _refuse_unknown(arm.adaptviz, config.adaptviz, f"arms.{arm.name}.adaptviz")
    if arm.data:
        flags = {"model_name_or_path": "-", "data_path": "-", "image_folder": "-", "output_dir": "-"}
        try:
            check((ModelArguments, DataArguments, LossArguments, TrainArguments),
                  as_words({**flags, **config.training, **arm.flags}))  # fmt: skip
        except ValueError as error:
            raise ValueError(f"`training` and arms.{arm.name}.flags: {error}") from error


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
