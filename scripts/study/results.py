"""What the finished units say, as results.json holds it: numbers of each arm over its seeds, paired comparisons."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from inference.llava_hound_dpo.evaluate import judged, read
from inference.llava_hound_dpo.summary import Row, flips
from llava.statistics import compare_sets, mean_of_groups, seed_interval
from scripts.study.config import BASE, PLAIN, Arm, Config
from scripts.study.running import commits, finished, progress
from scripts.study.units import Unit, answer_name

SCORE, BEGINS, CUT_OFF, RATIO = range(4)  # what is known of an answer
Key = tuple[str, str]  # an arm, and the way it was answered
NOT_AVERAGED = ("single", "multi")  # formats outside the mean, where there are others


@dataclass(frozen=True)
class Answered:
    """One arm answered in one way, K things known of the answer that each of S seeds gave to each of Q questions."""

    seeds: tuple[int, ...]
    known: np.ndarray  # (K, S, Q), NaN where there is no attention ratio
    formats: np.ndarray  # (Q,)
    categories: np.ndarray  # (Q,) "" where a question is of none
    flipped: tuple[float, ...] = ()  # share of questions that the order of the pictures decides, of each seed

    def averaged(self) -> "Answered":
        """The questions whose formats make the mean."""
        in_mean = ~np.isin(self.formats, NOT_AVERAGED)
        return self.only(in_mean | ~in_mean.any())

    def only(self, kept: np.ndarray) -> "Answered":
        """Some of the questions, (Q,) bool."""
        return replace(
            self, known=self.known[..., kept], formats=self.formats[kept], categories=self.categories[kept]
        )

    def of(self, seeds: Sequence[int]) -> "Answered":
        """The rows of these seeds; of the base, which is not trained, its own for every one."""
        rows = [self.seeds.index(seed) if seed in self.seeds else 0 for seed in seeds]
        flipped = tuple(self.flipped[row] for row in rows) if self.flipped else ()
        return replace(self, seeds=tuple(seeds), known=self.known[:, rows], flipped=flipped)

    def by_seed(self, number: int) -> np.ndarray:
        """(S,) one of the K, its mean over formats."""
        return mean_of_groups(self.known[number], self.formats)

    def by_category(self) -> dict[str, np.ndarray]:
        """(S,) scores of the questions of each category whose formats make the mean, their mean over these formats."""
        part = self.averaged()
        names = [name for name in dict.fromkeys(part.categories.tolist()) if name]
        return {name: part.only(part.categories == name).by_seed(SCORE) for name in names}


def collect(config: Config, output: Path, units: Sequence[Unit]) -> dict[str, Any]:
    """Everything that the reports show. Raises ValueError if nothing is answered yet."""
    ways = [(arm, way) for arm in config.arms.values() for way in (PLAIN, *arm.adaptviz)]
    answers = {(arm.name, way): answered(config, output, arm, way) for arm, way in ways}
    answers = {key: found for key, found in answers.items() if found}
    if not answers:
        raise ValueError(f"{output}: no test answers are finished yet, so there is nothing to report")
    labels = {(arm.name, way): arm.label + ("" if way == PLAIN else f" + {way}") for arm, way in ways}
    return {
        "config": config.raw,
        "progress": progress(output, units),
        "git_commits": commits(output, units),
        "arms": [
            {"arm": arm, "way": way, "label": labels[arm, way], "seeds": found.seeds, "numbers": numbers(found)}
            for (arm, way), found in answers.items()
        ],
        "comparisons": [
            {"control": one, "arm": other, "label": f"{labels[other]} - {labels[one]}", **found}
            for one, other in compared(config, answers)
            if (found := difference(answers[one], answers[other], one[0] == BASE))
        ],
    }


def answered(config: Config, output: Path, arm: Arm, way: str) -> Answered | None:
    """The answers of all finished seeds, judged as evaluate judges them; None if there are none."""
    seeds = [seed for seed in arm.seeds if finished(output, answer_name(arm, seed, way))]
    if not seeds:
        return None
    questions = Path(config.test.file.replace("{output}", str(output)))
    paths = [output / answer_name(arm, seed, way) / "answers.jsonl" for seed in seeds]
    every = judged(*read(paths, questions), "auto")
    rows = [[row for row in own if not row.asked.permutation] for own in every]
    known = np.array([[known_of(row) for row in own] for own in rows], dtype=float)
    formats = np.array([row.asked.image_type for row in rows[0]])
    categories = np.array([row.asked.category or "" for row in rows[0]])
    flipped = [flips(own) for own in every]
    shares = tuple(found["flipped"]["mean"] for found in flipped) if all(flipped) else ()
    return Answered(tuple(seeds), known.transpose(2, 0, 1), formats, categories, shares)


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
    part = found.averaged()
    by_seed = {"mean": part.by_seed(SCORE), "begins": part.by_seed(BEGINS), "cut_off": part.by_seed(CUT_OFF)}
    if not np.isnan(part.known[RATIO]).all():
        by_seed["ratio"] = np.nanmean(part.known[RATIO], axis=1)
    if found.flipped:
        by_seed["flipped"] = found.flipped
    for name in dict.fromkeys(found.formats.tolist()):
        by_seed[f"format/{name}"] = found.known[SCORE][:, found.formats == name].mean(axis=1)
    by_seed |= {f"category/{name}": scores for name, scores in found.by_category().items()}
    return {name: seed_interval(values) for name, values in by_seed.items()}


def compared(config: Config, keys: Collection[Key]) -> Iterator[tuple[Key, Key]]:
    """Each arm with the base and its controls; answered with AdaptViz, with the same arm and the base without."""
    for name, way in keys:
        others = (BASE, *config.arms[name].against) if way == PLAIN else (name, BASE)
        for control in dict.fromkeys((other, PLAIN) for other in others):
            if control != (name, way) and control in keys:
                yield control, (name, way)


def difference(control: Answered, arm: Answered, is_base: bool) -> dict[str, Any] | None:
    """Arm - control on the seeds that both have, None where they share none; the base stands beside every seed."""
    seeds = [seed for seed in arm.seeds if is_base or seed in control.seeds]
    if not seeds:
        return None
    one, other = (own.of(seeds).averaged() for own in (control, arm))
    scores = compare_sets(one.known[SCORE], other.known[SCORE], one.formats)
    after, before = other.by_category(), one.by_category()
    differences = {"begins": other.by_seed(BEGINS) - one.by_seed(BEGINS)}
    differences |= {f"category/{name}": after[name] - before[name] for name in after}
    if one.flipped and other.flipped:
        differences["flipped"] = np.subtract(other.flipped, one.flipped)
    return {"seeds": seeds, **scores, **{name: seed_interval(found, -1) for name, found in differences.items()}}
