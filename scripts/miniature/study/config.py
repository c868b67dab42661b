"""What the study runs: its arms, sizes and seeds, from one JSON file. Everything is checked before anything runs."""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.llava_hound_dpo.arguments import DataArguments, LossArguments, ModelArguments, TrainArguments

SIZES = ("seed", "num_pairs", "num_instructions", "num_single", "num_validation", "num_test")
CONFIRM = ("seeds", "data_seed", "num_test")
SOURCES = ("other_image", "random", "own_mistakes", "selected", "steered")  # of a pair set
MAKE_DATA = "scripts.miniature.make_data"
TITLE = "Study: attention-aware training and steering on the miniature world"
AGAINST = ("base", "sft", "dpo")  # what an arm after them is compared with, unless it says otherwise


@dataclass(frozen=True)
class PairSet:
    """Training pairs: where the rejected answers come from, and what is changed on purpose."""

    source: str  # one of SOURCES
    single: bool = False  # with pairs about single images
    shuffle_targets: bool = False  # the attention target is another image


@dataclass(frozen=True)
class Arm:
    """One way of training. `like` names the arm whose flags, pairs and learning rate it starts from."""

    name: str
    label: str
    group: str = "main"
    flags: Mapping[str, Any] = field(default_factory=dict)  # of run_dpo
    pairs: str | None = None  # name of a pair set; None: not trained
    like: str | None = None
    seeds: tuple[int, ...] = ()
    against: tuple[str, ...] = AGAINST
    adaptviz: bool = False  # also answered with AdaptViz
    confirm: bool = False  # also with the seeds and questions of `confirm`, on which nothing was chosen
    same_as: str | None = None  # only trained: its adapter must have the bytes of this arm's
    optional: bool = False  # left out, with a line that says so, where run_dpo lacks one of its flags


@dataclass(frozen=True)
class Config:
    """The study. `raw` is the file as it was read, the quick sizes applied."""

    base: str
    make_data: str  # the module that writes the world's data
    data: Mapping[str, int]
    steps: int
    batch: int
    training: Mapping[str, Any]  # flags of run_dpo that all arms share
    answering: Mapping[str, Any]  # flags of run_inference, run_adaptive and tune
    tune: Mapping[str, Any] | None  # further flags of tune; None: AdaptViz with its defaults only
    confirm: Mapping[str, Any] | None  # CONFIRM: seeds of training, seed and number of the questions
    selection: Mapping[str, Any]  # flags of data_gen.gen_chosen_rejected where a model answers
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    pair_sets: Mapping[str, PairSet]
    arms: Mapping[str, Arm]
    heads: Mapping[str, Any]  # flags of scripts.discover_heads, for the arms whose flags name {heads}
    seconds: Mapping[str, float]  # of a unit by kind, before any is measured
    left_out: Mapping[str, str]  # arm: reason
    raw: Mapping[str, Any] = field(repr=False)

    def root(self, arm: Arm) -> Arm:
        """The arm whose learning rate this one takes: the start of its chain of `like`."""
        return self.root(self.arms[arm.like]) if arm.like else arm


def read_config(path: Path, is_quick: bool = False) -> Config:
    """The study of a JSON file. Raises FileNotFoundError, ValueError naming the entry."""
    raw = _read_raw(path)
    quick = raw.pop("quick", {})
    try:
        return parse_config(_merged(raw, quick) if is_quick else raw)
    except KeyError as error:
        raise ValueError(f"{path}: the entry {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_raw(path: Path) -> dict[str, Any]:
    """The file's object; of one that `extends` another, a path beside it, the other's with its changes."""
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file; scripts/miniature/study.json is one")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: broken JSON at line {error.lineno}: {error.msg}") from error
    other = raw.pop("extends", None)
    return _merged(_read_raw(path.parent / other), raw) if other else raw


def _merged(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`raw` with the changes, object by object; `arms_kept` chooses among the arms."""
    kept = changes.pop("arms_kept", None)
    both = {name: _deep(raw.get(name), value) for name, value in changes.items()}
    raw = {**raw, **both}
    return raw if kept is None else {**raw, "arms": {name: raw["arms"][name] for name in kept}}


def _deep(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {**old, **{name: _deep(old.get(name), value) for name, value in new.items()}}


def parse_config(raw: Mapping[str, Any]) -> Config:
    """The study of a JSON object. Raises KeyError for a missing entry, ValueError for a wrong one."""
    _refuse_unknown(raw["data"], SIZES, "data")
    confirm = raw.get("confirm")
    if confirm is not None:
        _check_confirm(confirm, raw)
    pair_sets = {name: _pair_set(name, own) for name, own in raw["pair_sets"].items()}
    arms = _arms(raw, pair_sets)
    left_out = _without_flags(arms)
    config = Config(
        base=raw["base"], make_data=raw.get("make_data", MAKE_DATA), data=raw["data"], steps=raw["steps"],
        batch=raw["batch"], training=raw["training"],
        answering=raw["answering"], tune=raw.get("tune"), confirm=confirm, selection=raw["selection"],
        learning_rates=tuple(raw["learning_rates"]), seeds=tuple(raw["seeds"]), pair_sets=pair_sets,
        arms={name: arm for name, arm in arms.items() if name not in left_out}, heads=raw["heads"],
        seconds=raw["seconds"], left_out=left_out, raw=raw,
    )  # fmt: skip
    if not (config.learning_rates and config.seeds):
        raise ValueError("`learning_rates` and `seeds` need at least one entry each")
    if config.steps < 1 or config.batch < 1:
        raise ValueError("`steps` and `batch` must be 1 or more")
    _refuse_unknown(config.training, known_flags(), "training")
    return config


def _check_confirm(confirm: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """Raises KeyError for a missing entry, ValueError for seeds that the study itself uses."""
    _refuse_unknown(confirm, CONFIRM, "confirm")
    own = {"seeds": {*raw["seeds"], *raw["ablation_seeds"]}, "data_seed": {raw["data"]["seed"]}}
    for name, used in own.items():
        values = confirm[name] if name == "seeds" else [confirm[name]]
        if used & set(values):
            raise ValueError(f"confirm: {name} {confirm[name]}: the study itself uses {sorted(used)}, choose others")


def known_flags() -> set[str]:
    """The flags of run_dpo."""
    groups = (ModelArguments, DataArguments, LossArguments, TrainArguments)
    return {field.name for group in groups for field in dataclasses.fields(group) if field.init}


def _pair_set(name: str, raw: Mapping[str, Any]) -> PairSet:
    _refuse_unknown(raw, [f.name for f in dataclasses.fields(PairSet)], f"pair_sets.{name}")
    if raw.get("source") not in SOURCES:
        raise ValueError(f"pair_sets.{name}: source {raw.get('source')!r} is none of {', '.join(SOURCES)}")
    return PairSet(**raw)


def _arms(raw: Mapping[str, Any], pair_sets: Mapping[str, PairSet]) -> dict[str, Arm]:
    """The arms, each after the one it is like."""
    arms: dict[str, Arm] = {}
    for name, own in raw["arms"].items():
        where = f"arms.{name}"
        _refuse_unknown(own, [f.name for f in dataclasses.fields(Arm) if f.name != "name"], where)
        like = own.get("like")
        for other in filter(None, (like, own.get("same_as"))):
            if other not in arms:
                raise ValueError(f"{where}: {other!r} is no arm before it; there are {', '.join(arms) or 'none'}")
        before = [other for other in AGAINST if other in arms]
        arms[name] = _arm(name, own, arms[like] if like else None, before, raw)
        if arms[name].confirm and raw.get("confirm") is None:
            raise ValueError(f"{where}: there is no entry `confirm` with {', '.join(CONFIRM)}")
        if arms[name].pairs not in pair_sets and name != "base":
            raise ValueError(f"{where}: pairs {arms[name].pairs!r} is none of {', '.join(pair_sets)}")
    if "base" not in arms or arms["base"].pairs is not None:
        raise ValueError("arms: `base`, the model that is not trained and has no `pairs`, is missing")
    return arms


def _arm(name: str, own: Mapping[str, Any], like: Arm | None, before: list[str], raw: Mapping[str, Any]) -> Arm:
    """An arm with what it takes from the one it is like; without one it is compared with those of AGAINST before it."""
    values = {"label": name, **own, "name": name}
    values["flags"] = {**(like.flags if like else {}), **own.get("flags", {})}
    values.setdefault("pairs", like.pairs if like else None)
    values.setdefault("seeds", raw["ablation_seeds"] if like else raw["seeds"])
    values.setdefault("against", [like.name] if like else before)
    return Arm(**{**values, "seeds": tuple(values["seeds"]), "against": tuple(values["against"])})


def _without_flags(arms: Mapping[str, Arm]) -> dict[str, str]:
    """Optional arms that this run_dpo cannot train, with the reason. Raises ValueError for others."""
    known, left_out = known_flags(), {}
    for name, arm in arms.items():
        unknown = sorted(set(arm.flags) - known)
        if unknown and not arm.optional:
            _refuse_unknown(arm.flags, known, f"arms.{name}.flags")
        if unknown:
            left_out[name] = f"train.llava_hound_dpo.run_dpo has no flag --{unknown[0]}"
    return left_out


def _refuse_unknown(raw: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    known = sorted(known)
    for name in raw:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known[:8])} ..."
            raise ValueError(f"{where}: unknown entry {name!r}; {hint}")
