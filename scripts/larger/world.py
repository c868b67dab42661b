"""The larger world: emoji of 14 kinds in two drawing styles, and which glyphs are held out.

A glyph belongs to one split only, and styles are split as well: what is tested was never seen in training, neither the
glyph nor the hand that drew it. The name of such a glyph cannot be known then; its kind and category can. Both are
Unicode's own labels (subcategory and category), each called by one word that is one token. The kinds are those of
Unicode's that have enough glyphs and that a linear probe of the vision tower tells apart.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

CATEGORIES = {  # ours: (Unicode's, {kind: Unicode's subcategories})
    "nature": ("Animals & Nature", {"mammal": ("animal-mammal",), "plant": ("plant-flower", "plant-other")}),
    "food": ("Food & Drink", {"fruit": ("food-fruit",), "meal": ("food-prepared", "food-asian")}),
    "travel": ("Travel & Places", {
        "vehicle": ("transport-ground", "transport-air", "transport-water"),
        "building": ("place-building", "place-religious"), "clock": ("time",)}),
    "people": ("People & Body", {
        "hand": ("hand-fingers-open", "hand-fingers-partial", "hand-fingers-closed", "hand-single-finger", "hands"),
        "person": ("person", "person-role", "person-fantasy")}),
    "emotion": ("Smileys & Emotion", {
        "face": ("face-smiling", "face-affection", "face-tongue", "face-concerned", "face-neutral-skeptical"),
        "heart": ("heart",)}),
    "symbol": ("Symbols", {"arrow": ("arrow",), "letter": ("alphanum",), "shape": ("geometric",)}),
}  # fmt: skip
ATTRIBUTES = {
    "kind": tuple(kind for _, kinds in CATEGORIES.values() for kind in kinds),
    "category": tuple(CATEGORIES),
}  # no word is a value of both
STYLES = {"train": "google", "validation": "google", "test": "twitter"}
SHARES = {"train": 0.6, "validation": 0.15, "test": 0.25}  # of the glyphs of every kind
SPLIT_SEED = 0  # fixed: every data set and every base shares the same held-out glyphs


@dataclass(frozen=True)
class Glyph:
    """One emoji; both styles have a picture of this name."""

    file: str
    kind: str
    category: str


@dataclass(frozen=True)
class Scene:
    """A glyph in the style of its split, and the seed of everything that carries no meaning."""

    glyph: Glyph
    path: Path
    seed: int

    @property
    def kind(self) -> str:
        """What is shown."""
        return self.glyph.kind

    @property
    def category(self) -> str:
        """What it belongs to."""
        return self.glyph.category

    def picture(self) -> Image.Image:
        """The glyph in RGBA."""
        return _open(self.path)


@dataclass(frozen=True)
class Emoji:
    """The fetched glyphs by split and kind."""

    folder: Path
    by_split: Mapping[str, Mapping[str, tuple[Glyph, ...]]]

    def sample(self, rng: np.random.Generator, split: str) -> Scene:
        """A scene of the split; every kind is as likely as any other."""
        kinds = self.by_split[split]
        own = kinds[str(rng.choice(list(kinds)))]
        glyph = own[rng.integers(len(own))]
        return Scene(glyph, self.folder / STYLES[split] / glyph.file, int(rng.integers(2**31)))


def read_emoji(folder: Path) -> Emoji:
    """The glyphs below a folder that fetch has filled.

    Raises FileNotFoundError naming what is missing, ValueError if a kind has too few glyphs to split.
    """
    labels = folder / "emoji.json"
    if not labels.is_file():
        raise FileNotFoundError(f"{labels}: no such file; `python -m scripts.larger.fetch` gets it")
    glyphs = _labelled(json.loads(labels.read_text(encoding="utf-8")))
    for style in sorted(set(STYLES.values())):
        missing = [glyph.file for glyph in glyphs if not (folder / style / glyph.file).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder / style / missing[0]}: no such picture, nor {len(missing) - 1} others; "
                "`python -m scripts.larger.fetch` gets them"
            )
    return Emoji(folder, split_glyphs(glyphs))


def split_glyphs(glyphs: list[Glyph]) -> dict[str, dict[str, tuple[Glyph, ...]]]:
    """Every kind's glyphs, shared out to the splits in a fixed random order. Raises ValueError for a kind too small."""
    rng = np.random.default_rng(SPLIT_SEED)
    found: dict[str, dict[str, tuple[Glyph, ...]]] = {split: {} for split in SHARES}
    for kind in ATTRIBUTES["kind"]:
        own = sorted((glyph for glyph in glyphs if glyph.kind == kind), key=lambda glyph: glyph.file)
        bounds = np.round(np.cumsum(list(SHARES.values())) * len(own)).astype(int)
        parts = np.split(rng.permutation(len(own)), bounds[:-1])
        for split, part in zip(SHARES, parts, strict=True):
            if not len(part):
                raise ValueError(f"emoji of the kind {kind!r}: {len(own)} are too few to split")
            found[split][kind] = tuple(own[i] for i in part)
    return found


def _labelled(entries: list[dict]) -> list[Glyph]:
    """The emoji that both styles draw and whose subcategory is one of ours."""
    names = {
        (theirs, subcategory): (kind, category)
        for category, (theirs, kinds) in CATEGORIES.items()
        for kind, subcategories in kinds.items()
        for subcategory in subcategories
    }
    styles = [f"has_img_{style}" for style in sorted(set(STYLES.values()))]
    drawn = [entry for entry in entries if all(entry[style] for style in styles)]
    keys = [(entry, names.get((entry["category"], entry["subcategory"]))) for entry in drawn]
    return [Glyph(entry["image"], *key) for entry, key in keys if key]


@cache
def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGBA")
