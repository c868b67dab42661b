"""Choosing bands on validation questions, and the table of what they do to the others: arithmetic on a grid of answers.

Letters: N questions, F factors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from inference_optimization.llava_hound_dpo.adaptviz import AdaptViz, Bands
from inference_optimization.llava_hound_dpo.grid import ANOTHER, PLAIN, Variant
from llava.records import FORMATS
from llava.statistics import mcnemar, paired_difference, score_interval

THRESHOLDS = tuple(round(0.05 * n, 2) for n in range(1, 20))


@dataclass(frozen=True)
class Grid:
    """Scores of the same questions under every variant."""

    image_types: np.ndarray  # (N,) of FORMATS
    confidence: np.ndarray  # (N,) of the plain first token
    scores: dict[Variant, np.ndarray]  # (N,) 0 to 1 each

    def part(self, chosen: np.ndarray) -> "Grid":
        """The chosen questions, by index or by mask."""
        scores = {variant: values[chosen] for variant, values in self.scores.items()}
        return Grid(self.image_types[chosen], self.confidence[chosen], scores)

    @property
    def plain(self) -> np.ndarray:
        """(N,) scores without scaling."""
        return self.scores[PLAIN]

    def factors(self, scope: str, rule: str) -> dict[float, np.ndarray]:
        """(N,) scores by factor, 1.0 among them; the nearest to 1 first, so that ties change least."""
        own = {v.factor: scores for v, scores in self.scores.items() if (v.scope, v.rule) == (scope, rule)}
        return dict(sorted({**own, 1.0: self.plain}.items(), key=lambda item: abs(np.log(item[0]))))

    def under(self, settings: AdaptViz, scope: str | None = None) -> np.ndarray:
        """(N,) scores that the settings give. Raises KeyError if one of their factors is not in the grid."""
        factors = self.factors(scope or settings.scope, settings.rule)
        chosen = settings.factors(self.confidence, self.image_types)
        return np.array([factors[round(factor, 6)][n] for n, factor in enumerate(chosen.tolist())])

    @property
    def weights(self) -> np.ndarray:
        """(N,) so that every multi-image format counts the same, single pictures not at all; sums to 1."""
        counted = sorted(set(self.image_types) - {"single"}) or ["single"]
        share = {name: 1 / (len(counted) * np.count_nonzero(self.image_types == name)) for name in counted}
        return np.array([share.get(name, 0.0) for name in self.image_types])


def best_fixed(grid: Grid, scope: str, rule: str) -> Bands:
    """ScalingVis: the one factor with the highest mean over formats."""
    factors = grid.factors(scope, rule)
    return Bands.fixed(max(factors, key=lambda factor: grid.weights @ factors[factor]))


def best_bands(grid: Grid, scope: str, rule: str, most_bands: int = 3) -> Bands:
    """The thresholds and factors with the highest mean over formats, and of equal ones those that change least.

    Every band's factor is chosen for itself, because no question lies in two of them. Two bands are low = high; with
    three the middle one is left alone.
    """
    factors, weights = grid.factors(scope, rule), grid.weights
    best, best_value = Bands.fixed(1.0), (grid.weights @ grid.plain) + 1e-9
    for low in (0.0, *THRESHOLDS):
        for high in (*(h for h in THRESHOLDS if h >= low), 1.0):
            if most_bands == 2 and low != high:
                continue
            below, above = grid.confidence < low, grid.confidence >= high
            between = ~below & ~above
            value, chosen = weights[between] @ grid.plain[between], []
            for band in (below, above):
                gains = {factor: weights[band] @ scores[band] for factor, scores in factors.items()}
                chosen.append(max(gains, key=gains.get))
                value += gains[chosen[-1]]
            if value > best_value:
                best, best_value = Bands(low, high, chosen[0], chosen[1]), value + 1e-9
    return best


def compare(grid: Grid, scores: np.ndarray) -> dict[str, Any]:
    """What scaled scores are against plain ones: accuracy by format, difference with interval, fixed and broken."""
    difference, low, high = paired_difference(grid.plain, scores)
    fixed, broken = int((scores > grid.plain).sum()), int((scores < grid.plain).sum())
    formats = [name for name in FORMATS if name in set(grid.image_types)]
    accuracy_low, accuracy_high = score_interval(scores.tolist())
    return {
        "questions": len(scores),
        "accuracy": float(scores.mean()),
        "accuracy_low": accuracy_low,
        "accuracy_high": accuracy_high,
        "mean_of_formats": float(grid.weights @ scores),
        "relative_gain": float(grid.weights @ scores / max(grid.weights @ grid.plain, 1e-9) - 1),
        "by_format": {name: float(scores[grid.image_types == name].mean()) for name in formats},
        "difference": difference,
        "low": low,
        "high": high,
        "fixed": fixed,
        "broken": broken,
        "mcnemar_p": mcnemar(broken, fixed),
    }


def markdown(rows: Sequence[tuple[str, AdaptViz, dict[str, Any]]]) -> str:
    """Table of (name, settings, `compare`) rows."""
    formats = list(rows[0][2]["by_format"])
    head = ["", "settings", "accuracy %", "mean of multi-image formats", *formats, "difference to plain", "fixed"]
    lines = [[*head, "broken"], ["---", "---", *["---:"] * (len(head) - 1)]]
    lines += [[name, describe(settings.bands), *_cells(row)] for name, settings, row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    percent = {name: 100 * value for name, value in row.items() if isinstance(value, float)}
    return [
        "{accuracy:.1f} [{accuracy_low:.1f}, {accuracy_high:.1f}]".format_map(percent),
        "{mean_of_formats:.1f} ({relative_gain:+.1f} %)".format_map(percent),
        *(f"{100 * value:.1f}" for value in row["by_format"].values()),
        "{difference:+.1f} [{low:+.1f}, {high:+.1f}]".format_map(percent),
        *(f"{100 * row[name] / row['questions']:.1f} %" for name in ("fixed", "broken")),
    ]


def describe(bands: Bands) -> str:
    """The bands in a few words."""
    parts = [
        (bands.low > 0, bands.alpha_low, f"below {bands.low:g}"),
        (bands.low < bands.high, bands.alpha_middle, "between"),
        (bands.high < 1, bands.alpha_high, f"from {bands.high:g}"),
    ]
    there = [(factor, where) for is_there, factor, where in parts if is_there]
    if len({factor for factor, _ in there}) == 1:
        return f"{there[0][0]:g} always"
    return ", ".join(f"{factor:g} {where}" for factor, where in there if factor != 1)


def rows_of(
    validation: Grid, test: Grid, defaults: Sequence[AdaptViz], pairs: Sequence[tuple[str, str]]
) -> list[tuple[str, AdaptViz, dict[str, Any], dict[str, Any]]]:
    """(name, settings, on validation, on test) of everything that is compared.

    `defaults`: settings that are not tuned; the first, if it has a target, is also pointed at another image on purpose.
    `pairs`: scope and rule of what is tuned.
    """
    base = defaults[0]
    found = [("plain", AdaptViz(bands=Bands.fixed(1.0)), None)]
    found += [(f"default {settings.scope}", settings, None) for settings in defaults]
    if base.scope != "all":
        found.append((f"default {base.scope}, at another image", base, ANOTHER))
    if ("all", "multiply") in pairs:
        bands = best_fixed(validation, "all", "multiply"), best_bands(validation, "all", "multiply", most_bands=2)
        for name, own in zip(("ScalingVis", "AdaptVis"), bands, strict=True):
            found.append((f"{name}, tuned", replace(base, scope="all", bands=own), None))
    for scope, rule in pairs:
        settings = replace(base, scope=scope, rule=rule, bands=best_bands(validation, scope, rule))
        found.append((f"AdaptViz {scope} {rule}, tuned", settings, None))
    return [
        (name, settings, *(compare(grid, grid.under(settings, scope)) for grid in (validation, test)))
        for name, settings, scope in found
    ]
