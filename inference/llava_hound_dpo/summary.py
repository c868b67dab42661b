"""What many judged answers say: accuracy by group, confusion of images, attention against correctness, comparisons."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava.asked import the_one
from llava.choices import NUM_LETTERS, parse_choice
from llava.order import Order
from llava.records import FORMATS, Answer
from llava.scorers import MISSING, RIGHT, UNPARSED, WRONG, Result, exact, resolve, score
from llava.statistics import auc, mcnemar, paired_difference, score_interval

DEALS = 30  # answers to other questions that are tried on each wrong answered one, for the chance of confusion


@dataclass(frozen=True)
class Asked:
    """A question: all that scoring needs of it."""

    id: str
    where: str
    answer: str
    image_type: str
    targets: tuple[int, ...]  # 0-based; () for multi: no image is referred to
    num_regions: int | None  # images of a sequence or multi, cells of a collage, 2 of a pic-in-pic; None: unknown
    choices: tuple[str, ...]
    others: tuple[str, ...] | None
    category: str | None = None  # the part of the test set that it belongs to
    permutation: tuple[str, Order] | None = None  # id and order, where its pictures stand in another than given

    @property
    def target(self) -> int | None:
        """The one target; None without, or with several."""
        return the_one(self.targets)

    @property
    def tells(self) -> bool:
        """Whether some of what is shown is asked about and some is not, as far as is known."""
        return len(self.targets) not in (0, self.num_regions)

    @property
    def base(self) -> str:
        """The id of the question as it is given."""
        return self.permutation[0] if self.permutation else self.id


@dataclass(frozen=True)
class Row:
    """A question with what one model answered, judged."""

    asked: Asked
    given: Answer | None  # None: missing
    scorer: str
    result: Result

    @property
    def is_right(self) -> bool:
        """Whether the verdict is RIGHT (a graded score from RIGHT_FROM)."""
        return self.result.verdict == RIGHT


def judge(asked: Asked, given: Answer | None, scorer: str) -> Row:
    """Score one answer. Raises ValueError where a multiple-choice record's true answer is none of its options."""
    scorer = resolve(scorer, asked.choices)
    if given is None:
        return Row(asked, None, scorer, Result(0.0, MISSING))
    try:
        return Row(asked, given, scorer, score(scorer, given.text, asked.answer, asked.choices))
    except ValueError as error:
        raise ValueError(f"{asked.where}: {error}") from error


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """All numbers of one answers file, as scores.json holds them."""

    def of(*image_types: str) -> list[Row]:
        return [row for row in rows if row.asked.image_type in image_types]

    return {
        "overall": group(rows),
        "by_format": by(rows, lambda row: row.asked.image_type, FORMATS),
        "by_num_images": by(of("sequence", "collage", "multi"), lambda row: row.asked.num_regions or "unknown"),
        "by_position": {t: by(at_one_place(of(t)), _place) for t in ("sequence", "collage")},
        "by_category": by([row for row in rows if row.asked.category], lambda row: row.asked.category),
        "scorers": dict(Counter(row.scorer for row in rows)),
        "confusion": confusion(rows),
        "looked_answered": looked_answered(rows),
        "ratio_auc": ratio_auc(rows),
    }


def at_one_place(rows: Sequence[Row]) -> list[Row]:
    """Those with one target."""
    return [row for row in rows if row.asked.target is not None]


def _place(row: Row) -> str:
    return f"Image{row.asked.target + 1}"


def by(rows: Sequence[Row], key: Callable[[Row], Any], order: Sequence[str] = ()) -> dict[str, dict]:
    """`group` of the rows of each key, in the given order, else sorted with numbers as numbers."""
    keyed: dict[str, list[Row]] = {}
    for row in rows:
        keyed.setdefault(str(key(row)), []).append(row)
    found = [k for k in order if k in keyed] if order else sorted(keyed, key=_by_number)
    return {k: group(keyed[k]) for k in found}


def _by_number(key: str) -> list[tuple[int, str]]:
    """Sorts numbers in a name as numbers: Image2 before Image10."""
    return [(int(part), "") if part.isdecimal() else (10**9, part) for part in re.split(r"(\d+)", key) if part]


def group(rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracy (mean score over every question asked, missing ones too) with its 95 % interval, and the counts."""
    scores = [row.result.score for row in rows]
    low, high = score_interval(scores)
    verdicts = Counter(row.result.verdict for row in rows)
    ratios = [row.given.attention_ratio for row in with_ratio(rows)]
    return {
        "questions": len(rows),
        "accuracy": float(np.mean(scores)),
        "low": low,
        "high": high,
        **{verdict: verdicts[verdict] for verdict in (RIGHT, WRONG, UNPARSED, MISSING)},
        "cut_off": sum(row.given is not None and row.given.extra.get("is_complete") is False for row in rows),
        "too_long": sum(row.given is not None and row.given.extra.get("is_too_long") is True for row in rows),
        "attention_ratio": float(np.mean(ratios)) if ratios else None,
        "chance": _chance(rows),
    }


def _chance(rows: Sequence[Row]) -> float | None:
    """Accuracy of a model that answers truly about an image drawn at random: mean of 1/n; None where n is not known.

    None too for one image, and where a question refers to no image, or to several.
    """
    counts = [row.asked.num_regions if row.asked.target is not None else None for row in rows]
    return float(np.mean([1 / n for n in counts])) if all(n and n > 1 for n in counts) else None


def with_ratio(rows: Sequence[Row]) -> list[Row]:
    """Those whose attention ratio is known and means something: some of several images or parts were asked about."""
    return [row for row in rows if row.given and row.given.attention_ratio is not None and row.asked.tells]


# ---- a wrong answer that is true of another image


def confusion(rows: Sequence[Row], seed: int = 0) -> dict[str, Any] | None:
    """How many wrong answers are true of another image, and how many would be by chance; None without `others`.

    `chance`: the same rate when the wrong answers are dealt to one another's questions (those that would be right
    there left out), so it knows how often each answer is given. None where no other question has a wrong answer.
    """
    known = [row for row in rows if row.asked.others is not None]
    if not known:
        return None
    wrong = [row for row in known if row.result.verdict == WRONG]
    confused = sum(map(is_confused, wrong))
    return {
        "questions": len(known),
        "wrong": len(wrong),
        "true_of_another": confused,
        "rate": confused / len(known),
        "of_wrong": confused / len(wrong) if wrong else None,
        "chance": _chance_of_confusion(wrong, np.random.default_rng(seed)),
    }


def is_confused(row: Row) -> bool:
    """Whether the answer is wrong and true of another image."""
    return row.result.verdict == WRONG and row.asked.others is not None and _true_elsewhere(row, row.given.text)


def _true_elsewhere(row: Row, text: str) -> bool:
    """Whether the text, as an answer to this row's question, is true of another image."""
    asked = row.asked
    if row.scorer != "choice":
        return any(score(row.scorer, text, other).verdict == RIGHT for other in asked.others)
    number = parse_choice(text, len(asked.choices) or NUM_LETTERS, asked.choices)
    has_text = number is not None and number < len(asked.choices)
    return has_text and any(exact(asked.choices[number], other) for other in asked.others)


def _chance_of_confusion(wrong: Sequence[Row], rng: np.random.Generator) -> float | None:
    rates = []
    for place, row in enumerate(wrong):
        dealt = [n for n in rng.permutation(len(wrong))[: DEALS + 1] if n != place][:DEALS]
        texts = [wrong[n].given.text for n in dealt]
        verdicts = [score(row.scorer, text, row.asked.answer, row.asked.choices).verdict for text in texts]
        usable = [text for text, verdict in zip(texts, verdicts, strict=True) if verdict == WRONG]
        if usable:
            rates.append(sum(_true_elsewhere(row, text) for text in usable) / len(usable))
    return float(np.mean(rates)) if rates else None


# ---- looked right x answered right


def looked_right(row: Row) -> tuple[bool | None, str]:
    """Whether the attention was on the targets, and how that was told: (True, "argmax").

    "argmax": the t targets have the t largest shares of `attention_by_image` (a tie with another is no). "ratio":
    without those shares, more than an even share of the attention lay on the targets. (None, "unknown") where neither
    can be told: no answer, no image referred to or all of them, a collage whose cells nobody counted.
    """
    given, regions, targets = row.given, row.asked.num_regions, row.asked.targets
    if given is None or not row.asked.tells:
        return None, "unknown"
    if given.attention_by_image:
        shares = given.attention_by_image
        least = min(shares[target] for target in targets)
        return all(share < least for n, share in enumerate(shares) if n not in targets), "argmax"
    if given.attention_ratio is None or regions is None:
        return None, "unknown"
    return given.attention_ratio > len(targets) / regions, "ratio"


def looked_answered(rows: Sequence[Row]) -> dict[str, Any]:
    """The four quadrants of attention and correctness, and by which rule the attention was judged."""
    found = [(*looked_right(row), row.is_right) for row in rows]
    count, sides = Counter((looked, right) for looked, _, right in found), {"right": True, "wrong": False}
    judged_by = {rule: sum(how == rule for _, how, _ in found) for rule in ("argmax", "ratio", "unknown")}
    quadrants = {f"looked_{a}_answered_{b}": count[sides[a], sides[b]] for a in sides for b in sides}
    return quadrants | {"judged_by": judged_by}


def ratio_auc(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """How well the attention ratio tells right answers from other ones, over all and by format.

    `auc`: the chance that of a right and a wrong answer to questions of the same format and number of images the right
    one has the higher ratio, 0.5 where it says nothing: then raising it has nothing to act on. `by_layer`: the same of
    the ratio in each probed layer. None where no such two answers are.
    """
    known = with_ratio(rows)
    formats = [name for name in FORMATS if any(row.asked.image_type == name for row in known)]
    found = {name: _auc_of([row for row in known if row.asked.image_type == name]) for name in formats}
    return {"overall": _auc_of(known), **found}


def _auc_of(rows: Sequence[Row]) -> dict[str, Any]:
    right = sum(row.is_right for row in rows)
    by_layer = [row.given.extra.get("attention_ratio_by_layer") or [] for row in rows]
    layers = min(map(len, by_layer), default=0)
    return {
        "right": right,
        "other": len(rows) - right,
        "auc": _stratified_auc(rows, [row.given.attention_ratio for row in rows]),
        "by_layer": [_stratified_auc(rows, [ratios[n] for ratios in by_layer]) for n in range(layers)],
    }


def _stratified_auc(rows: Sequence[Row], ratios: Sequence[float]) -> float | None:
    """Over all pairs within a format and numbers of images and targets, which move both the ratio and the answers."""
    strata: dict[tuple, list[tuple[float, bool]]] = {}
    for row, ratio in zip(rows, ratios, strict=True):
        kind = row.asked.image_type, row.asked.num_regions, len(row.asked.targets)
        strata.setdefault(kind, []).append((ratio, row.is_right))
    wins = pairs = 0.0
    for stratum in strata.values():
        scores, is_right = zip(*stratum, strict=True)
        if count := sum(is_right) * (len(is_right) - sum(is_right)):
            wins, pairs = wins + count * auc(scores, is_right), pairs + count
    return wins / pairs if pairs else None


# ---- the same question, its pictures in another order


def flips(rows: Sequence[Row]) -> dict[str, Any] | None:
    """How often the order of the pictures decides; None where no question is answered in two orders.

    `flipped`: the share of questions so answered that are right in one order and not in another; `by_position`: the
    share right of all these answers, where there is one target. `missing`: orders without an answer, which count
    nowhere here.
    """
    answered: dict[str, list[Row]] = {row.asked.base: [] for row in rows if row.asked.permutation}
    asked = [row for row in rows if row.asked.base in answered]
    for row in asked:
        answered[row.asked.base] += [row] * (row.given is not None)
    several = [own for own in answered.values() if len(own) > 1]
    right = [sum(row.is_right for row in own) / len(own) for own in several]
    by_position: dict[int, list[bool]] = {}
    for row in at_one_place([row for own in several for row in own]):
        by_position.setdefault(row.asked.target + 1, []).append(row.is_right)
    if not several:
        return None
    return {
        "questions": len(several),
        "flipped": _share([0 < share < 1 for share in right]),
        "always_right": right.count(1),
        "never_right": right.count(0),
        "by_position": {f"Image{place}": _share(by_position[place]) for place in sorted(by_position)},
        "missing": sum(row.given is None for row in asked),
    }


def _share(found: Sequence[bool]) -> dict[str, float]:
    low, high = score_interval(found)
    return {"mean": float(np.mean(found)), "low": low, "high": high}


# ---- two models on the same questions


def compare(first: Sequence[Row], second: Sequence[Row]) -> dict[str, Any]:
    """Second - first over the same questions in the same order: difference with interval, and McNemar's exact test.

    `changed`: questions whose scores differ. The same `by_format`.
    """
    assert [row.asked.id for row in first] == [row.asked.id for row in second]
    pairs = list(zip(first, second, strict=True))
    by_format = {t: [pair for pair in pairs if pair[0].asked.image_type == t] for t in FORMATS}
    return _compared(pairs) | {"by_format": {t: _compared(own) for t, own in by_format.items() if own}}


def _compared(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    scores = [[row.result.score for row in own] for own in zip(*pairs, strict=True)]
    difference, low, high = paired_difference(*scores)
    right = Counter((a.is_right, b.is_right) for a, b in pairs)
    return {
        "questions": len(pairs),
        "changed": sum(a != b for a, b in zip(*scores, strict=True)),
        "difference": difference,
        "low": low,
        "high": high,
        "only_first_right": right[True, False],
        "only_second_right": right[False, True],
        "mcnemar_p": mcnemar(right[True, False], right[False, True]),
    }
