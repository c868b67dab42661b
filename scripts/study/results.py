"""What the finished units say, as results.json holds it: numbers of each arm over its seeds, paired comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from inference.llava_hound_dpo.evaluate import judged
from inference.llava_hound_dpo.summary import Row
from scripts.study.config import BASE, Arm, Config
from scripts.study.running import commits, finished
from scripts.study.statistics import compare, mean_of_groups, seed_interval
from scripts.study.units import PLAIN, Unit, answer_name, train_name

SCORE, BEGINS, CUT_OFF, RATIO = range(4)  # what is known of an answer
NOT_AVERAGED = ("single", "multi")  # formats outside the mean, where there are others


@dataclass(frozen=True)
class Answered:
    """One arm answered in one way, K things known of the answer that each of S seeds gave to each of Q questions."""

    seeds: tuple[int, ...]
    known: np.ndarray  # (K, S, Q), NaN where there is no attention ratio
    formats: np.ndarray  # (Q,)

    def part(self, is_single: bool) -> "Answered":
        """The questions about single images, or those whose formats make the mean."""
        in_mean = ~np.isin(self.formats, NOT_AVERAGED)
        chosen = self.formats == "single" if is_single else in_mean | ~in_mean.any()
        return Answered(self.seeds, self.known[..., chosen], self.formats[chosen])

    def of(self, seeds: Sequence[int]) -> "Answered":
        """The rows of these seeds; of the base, which is not trained, its own for every one."""
        rows = [self.seeds.index(seed) if seed in self.seeds else 0 for seed in seeds]
        return Answered(tuple(seeds), self.known[:, rows], self.formats)

    def by_seed(self, number: int) -> np.ndarray:
        """(S,) one of the K, its mean over formats."""
        return mean_of_groups(self.known[number], self.formats)


def collect(config: Config, output: Path, units: Sequence[Unit]) -> dict[str, Any]:
    """Everything that the reports show. Raises ValueError if nothing is answered yet."""
    ways = [(arm, way) for arm in config.arms.values() if not arm.same_as for way in (PLAIN, *arm.adaptviz)]
    answers = {(arm.name, way): answered(config, output, arm, way) for arm, way in ways}
    answers = {key: found for key, found in answers.items() if found}
    if not answers:
        raise ValueError(f"{output}: no test answers are finished yet, so there is nothing to report")
    return {
        "config": config.raw,
        "units": {"all": len(units), "finished": sum(bool(finished(output, unit.name)) for unit in units)},
        "git_commits": commits(output, units),
        "arms": [
            {"arm": arm, "way": way, "label": label(config, arm, way), "seeds": found.seeds, "numbers": numbers(found)}
            for (arm, way), found in answers.items()
        ],
        "comparisons": comparisons(config, answers),
        "sanity": sanity(config, output),
    }


def label(config: Config, arm: str, way: str) -> str:
    """What a reader sees."""
    return config.arms[arm].label + ("" if way == PLAIN else f" + {way}")


def answered(config: Config, output: Path, arm: Arm, way: str) -> Answered | None:
    """The answers of all finished seeds, judged as evaluate judges them; None if there are none."""
    seeds = [seed for seed in arm.seeds if finished(output, answer_name(arm, seed, way))]
    if not seeds:
        return None
    questions = Path(config.test.file.replace("{output}", str(output)))
    rows = judged([output / answer_name(arm, seed, way) / "answers.jsonl" for seed in seeds], questions, "auto")
    known = np.array([[known_of(row) for row in own] for own in rows], dtype=float)
    return Answered(tuple(seeds), known.transpose(2, 0, 1), np.array([row.asked.image_type for row in rows[0]]))


def known_of(row: Row) -> tuple[float, float, float, float]:
    """Score, whether it begins right, whether it was cut off, attention ratio; a missing answer is wrong.

    A model that only forgot to end its answers still begins right.
    """
    if row.given is None:
        return row.result.score, 0, 0, np.nan
    begins = row.given.text.strip().casefold().startswith(row.asked.answer.strip().casefold())
    ratio = np.nan if row.given.attention_ratio is None else row.given.attention_ratio
    return row.result.score, begins, row.given.extra.get("is_complete") is False, ratio


def numbers(found: Answered) -> dict[str, dict[str, Any]]:
    """By name, mean and t interval over seeds and the value of each seed; shares from 0 to 1."""
    part = found.part(False)
    by_seed = {"mean": part.by_seed(SCORE), "begins": part.by_seed(BEGINS), "cut_off": part.by_seed(CUT_OFF)}
    if not np.isnan(part.known[RATIO]).all():
        by_seed["ratio"] = np.nanmean(part.known[RATIO], axis=1)
    for name in dict.fromkeys(found.formats.tolist()):
        by_seed[f"format/{name}"] = found.known[SCORE][:, found.formats == name].mean(axis=1)
    return {name: asdict(seed_interval(values)) for name, values in by_seed.items()}


def comparisons(config: Config, answers: Mapping[tuple[str, str], Answered]) -> list[dict[str, Any]]:
    """Each arm with the base and its controls; answered with AdaptViz, with the same arm and the base without."""
    found = []
    for name, way in answers:
        others = (BASE, *config.arms[name].against) if way == PLAIN else (name, BASE)
        for control in dict.fromkeys(others):
            if (control, way) != (name, PLAIN) and (control, PLAIN) in answers:
                found += _comparison(config, (control, PLAIN), (name, way), answers)
    return found


def _comparison(
    config: Config, control: tuple[str, str], arm: tuple[str, str], answers: Mapping[tuple[str, str], Answered]
) -> list[dict[str, Any]]:
    """Arm - control on the seeds that both have; nothing where they share none."""
    seeds = [seed for seed in answers[arm].seeds if control[0] == BASE or seed in answers[control].seeds]
    if not seeds:
        return []
    found = {"control": control, "arm": arm, "seeds": seeds}
    found["label"] = f"{label(config, *arm)} - {label(config, *control)}"
    for name, is_single in (("mean", False), ("single", True)):
        one, other = (answers[key].of(seeds).part(is_single) for key in (control, arm))
        if one.formats.size:
            begins = seed_interval(other.by_seed(BEGINS) - one.by_seed(BEGINS), -1)
            scores = compare(one.known[SCORE], other.known[SCORE], one.formats)
            found[name] = asdict(scores) | {"begins": asdict(begins)}
    return [found]


def sanity(config: Config, output: Path) -> list[dict[str, Any]]:
    """For each arm that must equal another: whether their weights have the same bytes, by seed."""
    found = []
    for arm in (arm for arm in config.arms.values() if arm.same_as in config.arms):
        other = config.arms[arm.same_as]
        for seed in arm.seeds:
            names = [train_name(own, seed) for own in (arm, other)]
            if all(finished(output, name) for name in names):
                one, two = (_weights(output / name / "adapter") for name in names)
                found.append({"arm": arm.label, "same_as": other.label, "seed": seed, "is_same": one == two})
    return found


def _weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
