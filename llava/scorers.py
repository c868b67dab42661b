"""How an answer is judged against the true one: pure functions of text.

An answer nothing can be read from (empty; no option, or several, in multiple choice) is UNPARSED, a verdict of its own:
it scores 0, stays in the denominator and is counted. Nothing is ever filled in at random.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

SCORERS = ("exact", "contains", "choice", "f1", "rouge")
RIGHT, WRONG, UNPARSED, MISSING = "right", "wrong", "unparsed", "missing"
RIGHT_FROM = 0.5  # a graded score (F1, ROUGE-L) from here counts as right where right or wrong is asked
ARTICLES = {"a", "an", "the"}
NEGATIONS = set("no not never neither nor none cannot without isnt arent wasnt werent doesnt dont cant wont".split())
POLAR = {"yes", "no", "true", "false"}


@dataclass(frozen=True)
class Result:
    """Score (0 to 1) and verdict of one answer."""

    score: float
    verdict: str  # RIGHT, WRONG, UNPARSED or MISSING


def resolve(scorer: str, choices: Sequence[str]) -> str:
    """The scorer itself; `auto` is `choice` for a question with choices, else `exact`."""
    return ("choice" if choices else "exact") if scorer == "auto" else scorer


def score(scorer: str, text: str, answer: str, choices: Sequence[str] = ()) -> Result:
    """Judge `text` against the true `answer` by the named scorer.

    Raises ValueError where a multiple-choice record's true answer is none of its options.
    """
    if scorer == "choice":
        return _score_choice(text, answer, choices)
    if not words(text):
        return Result(0.0, UNPARSED)
    value = float({"exact": exact, "contains": contains, "f1": token_f1, "rouge": rouge_l}[scorer](text, answer))
    return Result(value, RIGHT if value >= RIGHT_FROM else WRONG)


# ---- free text


@lru_cache(maxsize=100_000)
def words(text: str) -> tuple[str, ...]:
    """Lower-case words without punctuation; a decimal point, a minus sign and digits grouped by commas survive."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'").replace("'", "")
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    places = {match.start() for match in re.finditer(r"(?<=\d)\.(?=\d)|(?<![\w.])[-−](?=\d)", text)}
    plain = (c if i in places or unicodedata.category(c)[0] not in "PS" else " " for i, c in enumerate(text))
    return tuple("".join(plain).split())


def normalise(text: str) -> tuple[str, ...]:
    """Words without articles, unless nothing else is left.

    Source: SQuAD v1.1 evaluate-v1.1.py (`normalize_answer`); there punctuation is deleted, so that "1.5" is "15".
    """
    every = words(text)
    return tuple(word for word in every if word not in ARTICLES) or every


def exact(text: str, answer: str) -> bool:
    """Whether both are the same up to case, articles, punctuation and spaces."""
    return normalise(text) == normalise(answer)


def contains(text: str, answer: str) -> bool:
    """Whether the answer's words stand in the text, in order and whole ("red" is not in "a hundred")."""
    return bool(_places(normalise(text), normalise(answer)))


def token_f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall over normalised words, repeated words counted.

    Source: Rajpurkar et al. 2016 (SQuAD), section 6.1.
    """
    given, true = normalise(text), normalise(answer)
    return _f1((Counter(given) & Counter(true)).total(), len(given), len(true))


def rouge_l(text: str, answer: str) -> float:
    """F1 over the longest common subsequence of words, articles included.

    Source: Lin 2004 (ROUGE), section 3, with beta = 1 and no stemming, as the package rouge-score has it.
    """
    given, true = words(text), words(answer)
    return _f1(_common_subsequence(given, true), len(given), len(true))


def _f1(common: int, given: int, true: int) -> float:
    return 2 * common / (given + true) if common else 0.0


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    row = [0] * (len(second) + 1)  # lengths for the words of `first` so far and each start of `second`
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, 1):
            diagonal, row[column] = row[column], diagonal + 1 if word == other else max(row[column], row[column - 1])
    return row[-1]


def _places(inside: tuple[str, ...], wanted: tuple[str, ...]) -> list[range]:
    """Where `wanted` stands in `inside`."""
    length = len(wanted)
    starts = range(len(inside) - length + 1) if length else ()
    return [range(start, start + length) for start in starts if inside[start : start + length] == wanted]


# ---- multiple choice

NUM_LETTERS = 8  # A to H are read as labels even where fewer options exist; one without an option is refused
_AFTER_LABEL_A = "because|since|as|and|or|is|was|with|for|but|in"  # else a word after "A" makes it an article
_NEGATED = re.compile(r"\b(?:not|never|neither|nor|cannot|incorrect|wrong|except|rather than)\b|n['’]t\b", re.I)
_LEAD_IN = re.compile(
    r"^\W*(?:(?:so|therefore|thus)\W+)?(?:(?:the\s+)?(?:\w+\s+)?(?:answer|option|choice)\s*(?:is\b|[:=])|it\s+is\b|it['’]s\b)"
    r"\s*:?\s*",
    re.I,
)


@dataclass(frozen=True)
class _Labels:
    """Patterns of option labels, made for a number of letters."""

    one: str
    run: str  # one label, or several joined by a comma, a slash, `or`, `and`

    @classmethod
    def of(cls, num_options: int) -> "_Labels":
        last = chr(ord("A") + max(num_options, NUM_LETTERS) - 1)
        article = rf"(?![ \t]+(?!(?i:{_AFTER_LABEL_A})\b)\w)"
        bare = rf"\b(?:[B-{last}]|A{article})(?![\w'’])"
        one = rf"(?:[(\[]\s*[A-{last}a-{last.lower()}]\s*[)\]]|{bare})"
        return cls(one, rf"{one}(?:\s*(?:,|/|&|\bor\b|\band\b)\s*{one})*")

    @property
    def leading(self) -> str:
        """A label that opens a line: "A", "A.", "A)", "(A)", "A: red", "B - red", "B (red)"."""
        plain = rf"(?P<run>{self.run})(?:\s*$|\s*[.):\],](?=\s|$)|\s+[-–—(]|(?<=[)\]]))"
        return rf"^\s*{plain}(?!\s*(?i:is\s+(?:not|wrong|incorrect)\b))"

    @property
    def stated(self) -> tuple[str, ...]:
        """Sentences that name the answer."""
        noun = r"\b(?:answer|option|choice)\s*(?:(?:is|was|would be|should be|must be)\b\s*[:=]?|[:=\-])"
        verb = r"\b(?:choose|pick|select|go with|it is|it['’]s)\b\s*:?"
        adverb = r"(?:definitely|probably|likely|most likely|clearly)\s+"
        before = rf"(?i:(?:{noun}|{verb})\s*(?:{adverb})?(?:(?:option|choice|letter)\s+)?)"
        after = r"(?i:\s+is\s+(?:the\s+)?(?:correct|right|best|answer|true)\b)"
        whole = r"(?i:^\s*(?:the\s+)?(?:answer|option|choice|letter)\s+)"
        return f"{before}(?P<run>{self.run})", f"(?P<run>{self.run}){after}", rf"{whole}(?P<run>{self.run})\W*$"


def parse_choice(text: str, num_options: int, options: Sequence[str] = ()) -> int | None:
    """0-based option that an answer names, or None where it names none, several or a contradiction.

    Read in this order: a label that opens a line or that a sentence states to be the answer ("the answer is A",
    "Answer: A", "B is correct"), a label in brackets, else the text of an option. A label followed by the text of
    another option is a contradiction. Lower case counts as a label in brackets, and alone at the start or end.
    """
    plain = _plain(text)
    labels = _Labels.of(num_options)
    found, rest = _named(plain, labels)
    if not found:
        return _option_by_text(plain, options)
    letter = ord(next(iter(found))) - ord("A")
    if len(found) > 1 or letter >= num_options:
        return None
    said = normalise(_LEAD_IN.sub("", rest))
    contradicts = said and any(said == normalise(option) for i, option in enumerate(options) if i != letter)
    agrees = options and said == normalise(options[letter])
    return None if contradicts and not agrees else letter


def _plain(text: str) -> str:
    """The text without mark-up; a lone lower-case letter at its start or end as a capital."""
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"\\boxed\{\s*(?:\\text\{)?\s*([A-Za-z])\s*\}*", r"(\1)", text)
    text = re.sub(r"</?\w+>", "\n", text)
    text = re.sub(r"[*_`$\"“”#]+", "", text).strip()
    last = re.sub(r"(?:^|(?<=[:\s]))[a-h](?=\W*$)", lambda match: match[0].upper(), text)
    return re.sub(r"^[a-h](?=[.):]\s)", lambda match: match[0].upper(), last)


def _named(text: str, labels: _Labels) -> tuple[set[str], str]:
    """Letters of the labels that the text gives as its answer, and the text without them."""
    leading = [match for line in re.finditer(r"[^\n]+", text) if (match := re.search(labels.leading, line[0]))]
    stated = [match for pattern in labels.stated for match in re.finditer(pattern, text) if not _denied(text, match)]
    brackets = list(re.finditer(r"[(\[]\s*[A-Ha-h]\s*[)\]]", text))
    is_list = len(_letters(leading, labels) | _letters(brackets, labels)) > 1  # the options, repeated
    if stated:
        used = stated if is_list else stated + leading
    else:
        used = leading + brackets if leading or not _NEGATED.search(text) else []
    rest = text
    for match in used:
        rest = rest.replace(match[0], " ", 1)
    return _letters(used, labels), rest


def _letters(matches: Sequence[re.Match], labels: _Labels) -> set[str]:
    runs = (match.groupdict().get("run") or match[0] for match in matches)
    return {letter.upper() for run in runs for one in re.findall(labels.one, run) for letter in re.findall(r"\w", one)}


def _denied(text: str, match: re.Match) -> bool:
    """Whether the clause that leads to the match holds a negation ("I don't think the answer is B")."""
    return bool(_NEGATED.search(re.split(r"[.!?;,\n]", text[: match.start()])[-1]))


def _option_by_text(text: str, options: Sequence[str]) -> int | None:
    """The one option whose text the answer is, or mentions in whole words and does not deny."""
    spoken = [normalise(option) for option in options]
    clause = normalise(re.split(r"[.,;!\n]", text, maxsplit=1)[0])
    for said in (normalise(text), normalise(_LEAD_IN.sub("", text)), clause if POLAR & set(clause) else ()):
        same = [number for number, option in enumerate(spoken) if said and said == option]
        if same:
            return same[0] if len(same) == 1 else None
    said = normalise(text)
    if NEGATIONS & set(said) and not any(NEGATIONS & set(option) for option in spoken):
        return None
    places = [(number, place) for number, option in enumerate(spoken) for place in _places(said, option)]
    mentioned = {number for number, place in places if not any(_inside(place, other) for _, other in places)}
    return mentioned.pop() if len(mentioned) == 1 else None


def _inside(place: range, other: range) -> bool:
    """Whether a place is a part of a longer one ("red" in "dark red")."""
    return len(place) < len(other) and place.start >= other.start and place.stop <= other.stop


def true_choice(answer: str, choices: Sequence[str]) -> int:
    """0-based option that the record's true answer is: the text of one, else its letter. Raises ValueError."""
    same = [number for number, option in enumerate(choices) if normalise(option) == normalise(answer)]
    letter = re.fullmatch(r"\W*([A-Za-z])\W*", answer)
    number = same[0] if len(same) == 1 else ord(letter[1].upper()) - ord("A") if letter and not same else -1
    if not 0 <= number < (len(choices) or NUM_LETTERS):
        limit = f"the {len(choices)} `choices`" if choices else "the letters A to H, and the record has no `choices`"
        raise ValueError(f"multiple choice: the true answer {answer!r} is not one of {limit}")
    return number


def _score_choice(text: str, answer: str, choices: Sequence[str]) -> Result:
    true = true_choice(answer, choices)
    given = parse_choice(text, len(choices) or NUM_LETTERS, choices)
    if given is None:
        return Result(0.0, UNPARSED)
    return Result(float(given == true), RIGHT if given == true else WRONG)
