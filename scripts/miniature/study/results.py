"""What the finished units say, as results.json holds it: numbers of each arm over its seeds, paired comparisons."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inference.llava_hound_dpo.evaluate import judged
from inference.llava_hound_dpo.summary import Row
from scripts.miniature.study.config import Arm, Config
from scripts.miniature.study.running import FINISHED, is_finished
from scripts.miniature.study.statistics import compare, mean_of_groups, seed_interval
from scripts.miniature.study.units import (
    ADAPTVIZ,
    PLAIN,
    TUNED,
    Unit,
    confirm_name,
    confirm_seeds,
    test_name,
    train_name,
    tune_name,
)

NOT_AVERAGED = ("single", "multi")  # formats outside the mean of the multi-image formats
CURVES = ("rewards/margins", "attention/ratio", "losses/sft")  # of the training log, for the plots
HOW = {PLAIN: "", ADAPTVIZ: " + AdaptViz", TUNED: " + AdaptViz, tuned"}


@dataclass(frozen=True)
class Answered:
    """Scores of one arm, answered in one way: a row for each seed, a column for each question."""

    seeds: tuple[int, ...]
    scores: np.ndarray  # (S, Q), 0 to 1
    begins: np.ndarray  # (S, Q), 1 where the answer begins with the true one, however it goes on
    formats: np.ndarray  # (Q,)

    def part(self, is_single: bool) -> "Answered":
        """The questions about single images, or all others."""
        chosen = np.isin(self.formats, NOT_AVERAGED) == is_single
        return Answered(self.seeds, self.scores[:, chosen], self.begins[:, chosen], self.formats[chosen])

    def begins_by_seed(self) -> np.ndarray:
        """(S,) mean over formats of the share that begins right."""
        return mean_of_groups(self.begins, self.formats)


def choose_rates(config: Config, output: Path) -> dict[str, float | None]:
    """The learning rate of each arm that chooses one: best on validation, of equals the smaller; None if open."""
    rates: dict[str, float | None] = {}
    for name, found in validation_scores(config, output).items():
        complete = all(value is not None for value in found.values())
        rates[name] = max(found, key=lambda rate, own=found: (own[rate], -rate)) if complete else None
    return rates


def validation_scores(config: Config, output: Path) -> dict[str, dict[float, float | None]]:
    """Mean accuracy of the multi-image formats by arm and learning rate, None where it is not there yet."""
    roots = {config.root(arm).name for arm in config.arms.values() if arm.pairs and arm.seeds}
    return {name: {rate: _validation(output, name, rate) for rate in config.learning_rates} for name in sorted(roots)}


def _validation(output: Path, arm: str, rate: float) -> float | None:
    name = f"validate/{arm}/{rate:g}"
    return metrics(_scores(output, name)[PLAIN])["mean"] if is_finished(output, name) else None


def _scores(output: Path, name: str) -> dict[str, Any]:
    return json.loads((output / name / "scores.json").read_text(encoding="utf-8"))["answers"]


def collect(config: Config, output: Path, units: Sequence[Unit]) -> dict[str, Any]:
    """Everything that the reports show. Raises ValueError if no arm has test answers yet."""
    rates = choose_rates(config, output)
    arms = {arm.name: arm_results(config, output, arm, rates.get(config.root(arm).name))
            for arm in config.arms.values() if arm.seeds and not arm.same_as}  # fmt: skip
    arms = {name: found for name, found in arms.items() if found["ways"]}
    if not arms:
        raise ValueError(f"{output}: no test answers are finished yet, so there is nothing to report")
    answered = {}
    for name, own in arms.items():
        folders = {seed: test_name(config.arms[name], seed) for seed in own["seeds"]}
        for way, numbers in own["ways"].items():
            answered[name, way] = answers(output, folders, way, "data/test.json")
            numbers |= intervals([{"begins": value} for value in answered[name, way].part(False).begins_by_seed()])
    return {
        "config": config.raw,
        "finished": {"units": len(units), "finished": sum(is_finished(output, unit.name) for unit in units)},
        "git_commits": commits(output, units),
        "arms": arms,
        "validation": validation_scores(config, output),
        "comparisons": comparisons(config, answered),
        "confirmed": comparisons(config, confirmed(config, output, arms)),
        "sanity": sanity(config, output, rates),
        "left_out": dict(config.left_out),
    }


def commits(output: Path, units: Iterable[Unit]) -> list[str]:
    """Of the code that the finished units ran with."""
    markers = [output / unit.name / FINISHED for unit in units if is_finished(output, unit.name)]
    return sorted({json.loads(marker.read_text(encoding="utf-8"))["git_commit"] for marker in markers})


def arm_results(config: Config, output: Path, arm: Arm, rate: float | None) -> dict[str, Any]:
    """Label, rate, seeds that are finished, and by way of answering every number with its interval over seeds."""
    seeds = [seed for seed in arm.seeds if is_finished(output, test_name(arm, seed))]
    by_seed = {seed: _scores(output, test_name(arm, seed)) for seed in seeds}
    ways = [way for way in HOW if seeds and all(way in found for found in by_seed.values())]
    logs = [training_log(output / train_name(arm, rate, seed)) for seed in seeds] if arm.pairs else []
    tuned = output / tune_name(arm) / "tuned.json"
    return {
        "label": arm.label, "group": arm.group, "learning_rate": rate if arm.pairs else None, "seeds": seeds,
        "ways": {way: intervals([metrics(by_seed[seed][way]) for seed in seeds]) for way in ways},
        "training": intervals([last_of(log) for log in logs]) if logs else {},
        "curves": curves(logs),
        "adaptviz": json.loads(tuned.read_text(encoding="utf-8"))["chosen"] if tuned.is_file() else None,
    }  # fmt: skip


def metrics(found: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of one answers file of scores.json, under flat names; shares from 0 to 1."""
    formats = found["by_format"]
    several = [group["accuracy"] for name, group in formats.items() if name not in NOT_AVERAGED]
    flat: dict[str, float | None] = {"mean": float(np.mean(several)) if several else None}
    flat |= {f"format/{name}": group["accuracy"] for name, group in formats.items()}
    flat |= {f"images/{name}": group["accuracy"] for name, group in found["by_num_images"].items()}
    for image_type, positions in found["by_position"].items():
        flat |= {f"position/{image_type}, {name}": group["accuracy"] for name, group in positions.items()}
    flat["ratio"] = found["overall"]["attention_ratio"]
    flat |= {f"ratio/{name}": group["attention_ratio"] for name, group in formats.items() if name not in NOT_AVERAGED}
    confusion = found["confusion"] or {}
    flat |= {"confusion": confusion.get("of_wrong"), "chance": confusion.get("chance")}
    flat |= {f"auc/{name}": own["auc"] for name, own in found.get("ratio_auc", {}).items()}
    return flat | _looked(found["looked_answered"])


def _looked(found: Mapping[str, Any]) -> dict[str, float]:
    counts = {name: count for name, count in found.items() if name != "judged_by"}
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()} if total else {}


def intervals(rows: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Each number's mean and t interval over seeds, and its values; without those that a seed lacks."""
    names = [name for name in rows[0] if all(row.get(name) is not None for row in rows)] if rows else []
    found = {}
    for name in names:
        values = [row[name] for row in rows]
        found[name] = dataclasses.asdict(seed_interval(values)) | {"values": values}
    return found


def training_log(folder: Path) -> list[dict[str, float]]:
    """The logged steps of one training."""
    state = json.loads((folder / "adapter/trainer_state.json").read_text(encoding="utf-8"))
    return [step for step in state["log_history"] if "loss" in step]


def last_of(log: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """What the training ended with: reward margin (nats times beta), attention ratio and loss of the chosen answer."""
    return {name: log[-1].get(name) for name in CURVES} if log else {}


def curves(logs: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, list[list[float]]]:
    """By quantity, [step, mean over seeds] of every logged step that all seeds have."""
    steps = zip(*logs, strict=False)
    found: dict[str, list[list[float]]] = {name: [] for name in CURVES}
    for own in steps:
        for name in CURVES:
            if all(name in step for step in own):
                found[name].append([own[0]["step"], float(np.mean([step[name] for step in own]))])
    return {name: points for name, points in found.items() if points}


def answers(output: Path, folders: Mapping[int, str], way: str, questions: str) -> Answered:
    """The scores of every question, judged as evaluate judges them; `folders` by seed."""
    rows = judged([output / name / f"{way}.jsonl" for name in folders.values()], output / questions, "auto")
    scores = np.array([[row.result.score for row in own] for own in rows])
    begins = np.array([[begins_right(row) for row in own] for own in rows], dtype=float)
    return Answered(tuple(folders), scores, begins, np.array([row.asked.image_type for row in rows[0]]))


def begins_right(row: Row) -> bool:
    """Whether the answer begins with the true one: a model that only forgot to end its answers still does."""
    return row.given is not None and row.given.text.strip().casefold().startswith(row.asked.answer.casefold())


def confirmed(config: Config, output: Path, names: Iterable[str]) -> dict[tuple[str, str], Answered]:
    """What is there of these arms' answers to the fresh questions, trained with the fresh seeds."""
    found = {}
    for arm in (config.arms[name] for name in names):
        folders = {seed: confirm_name(arm, seed) for seed in confirm_seeds(config, arm)}
        folders = {seed: name for seed, name in folders.items() if is_finished(output, name)}
        if folders:
            found[arm.name, PLAIN] = answers(output, folders, PLAIN, "fresh/test.json")
    return found


def comparisons(config: Config, answered: Mapping[tuple[str, str], Answered]) -> list[dict[str, Any]]:
    """Each arm with the base and those it is compared with, and with AdaptViz against itself and the base without."""
    pairs = []
    for name, way in answered:
        if way != PLAIN:
            pairs.append(((name, PLAIN), (name, way)))
            if ("base", PLAIN) in answered and name != "base":
                pairs.append((("base", PLAIN), (name, way)))
        else:
            others = dict.fromkeys(["base", *config.arms[name].against])
            pairs += [((o, PLAIN), (name, PLAIN)) for o in others if o != name and (o, PLAIN) in answered]
    found = [_comparison(first, second, answered) for first, second in pairs]
    return [comparison for comparison in found if comparison]


def _comparison(
    first: tuple[str, str], second: tuple[str, str], answered: Mapping[tuple[str, str], Answered]
) -> dict[str, Any] | None:
    """Second - first on the seeds that both have; the base, which has none, stands beside every seed."""
    seeds = [seed for seed in answered[second].seeds if first[0] == "base" or seed in answered[first].seeds]
    if not seeds:
        return None
    parts = {}
    for part, is_single in (("mean", False), ("single", True)):
        one, other = (_of_seeds(answered[key].part(is_single), seeds, key[0] == "base") for key in (first, second))
        if one.scores.size:
            parts[part] = dataclasses.asdict(compare(one.scores, other.scores, one.formats))
            parts[part]["begins"] = dataclasses.asdict(seed_interval(other.begins_by_seed() - one.begins_by_seed()))
    return {"first": first, "second": second, "seeds": seeds, **parts}


def _of_seeds(found: Answered, seeds: Sequence[int], is_base: bool) -> Answered:
    rows = [0 if is_base else found.seeds.index(seed) for seed in seeds]
    return Answered(tuple(seeds), found.scores[rows], found.begins[rows], found.formats)


def sanity(config: Config, output: Path, rates: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """For each arm that must equal another: whether the adapters have the same bytes, by seed."""
    found = []
    for arm in config.arms.values():
        rate = rates.get(config.root(arm).name)
        for seed in arm.seeds if arm.same_as and rate else ():
            names = [train_name(own, rate, seed) for own in (arm, config.arms[arm.same_as])]
            if all(is_finished(output, name) for name in names):
                own, other = ((output / name / "adapter/adapter_model.safetensors").read_bytes() for name in names)
                same = {"seed": seed, "is_same": own == other}
                found.append({"arm": arm.name, "label": arm.label, "same_as": arm.same_as, **same})
    return found
