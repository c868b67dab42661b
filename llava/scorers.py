"""How an answer is judged against the true one: pure functions of text.

An answer nothing can be read from (empty; no option, or several, in multiple choice) is UNPARSED, a verdict of its own:
it scores 0, stays in the denominator and is counted. Nothing is ever filled in at random.
"""

import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from rapidfuzz.distance import LCSseq

SCORERS = ("exact", "contains", "choice", "f1", "rouge")
RIGHT, WRONG, UNPARSED, MISSING = "right", "wrong", "unparsed", "missing"
RIGHT_FROM = 0.5  # a graded score (F1, ROUGE-L) from here counts as right where right or wrong is asked
ARTICLES = {"a", "an", "the"}


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
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'").replace("'", "").replace("−", "-")
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    places = {match.start() for match in re.finditer(r"(?<=\d)\.(?=\d)|(?<![\w.])-(?=\d)", text)}
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
    given, wanted = normalise(text), normalise(answer)
    return bool(wanted) and f" {' '.join(wanted)} " in f" {' '.join(given)} "


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
    return _f1(LCSseq.similarity(given, true), len(given), len(true))


def _f1(common: int, given: int, true: int) -> float:
    return 2 * common / (given + true) if common else 0.0


# ---- multiple choice

NUM_LETTERS = 8  # A to H are read as labels even where fewer options exist; one without an option is refused
LONGEST = 10_000  # characters of an answer that are read; of a longer one, the beginning and the end
POLAR = {"yes", "no", "true", "false"}
SPOKEN = "\ue000"  # stands for every character of an option's text, where only what is said around it is read
_AFTER_LABEL_A = "because|since|as|and|or|is|was|with|for|but|in|not|rather|instead|due|fits|matches|describes"
_REASON = r"because|since|due to|given that|for (?=it|the|there)|as (?=it|the|they|this|that|there|both|only|all)"
_CONTRAST = r"instead of|rather than|unlike|(?<!other )than|nor|and not"
_CONTRAST += r"|not(?= +(?:an? +|the +|option +)?(?:[\ue000(]|(?-i:[A-H]\b)))"  # "B not A"
_NEGATED = re.compile(
    rf"\b(?:{_CONTRAST}|not|no|nope|none|never|neither|cannot|without|incorrect|wrong|false|untrue|except|impossible|"
    r"rule[ds]? out|ruling out|eliminat\w+|exclud\w+|(?:is|are|was|were|do|does|did|ca|wo)nt)\b|n['’]t\b",
    re.I,
)
_SURE = re.compile(r"\b(?:no|without (?:an?y? )?|beyond (?:an?y? )?) ?(?:doubt|question)\b|\bnot only\b", re.I)
_BREAK = re.compile(  # what ends a clause, or opens one; a comma in a row of options does neither
    rf"(?P<end>\.(?!\d)|[!?;\n]|,(?!(?<=\d,)\d)(?!(?<=\ue000,) *(?:and |or )?\ue000))"
    rf"|\b(?:(?P<reason>{_REASON})|{_CONTRAST}|but|while|whereas|although|though|however|so"
    r"|and(?= +\S+ +(?:is|was)\b))\b",
    re.I,
)
_PREDICATE = re.compile(
    r"\s*(?:is|are|was|can|could|do|does|would|should|must|may|has|looks?|seems?|sounds?|n['’]t)", re.I
)
_RETRACTION = re.compile(r"\W*(?:no|nope|not|wrong|false)\W*", re.I)
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
        return cls(one, rf"{one}(?:\s*(?:,|/|&|\bor\b|\band\b)\s*{one}){{0,30}}")

    @property
    def leading(self) -> str:
        """A label that opens a line: "A", "A.", "A)", "(A)", "A: red", "B - red", "B (red)", "Option B because"."""
        adverb = r"so|thus|hence|therefore|probably|likely|definitely|clearly|obviously|certainly|maybe|perhaps"
        noun = r"(?:the\s+)?(?:(?:correct|right|best|final)\s+)?(?:answer|option|choice|letter)"
        word = rf"\s+(?:{_REASON}|{_CONTRAST}|but|while|whereas|fits|matches|describes|it is|for sure)\b"
        after = rf"(?:\W*$|\s*[.):\],;!?](?=\s|$)|\s+[-–—(]|(?<=[)\]])|(?i:(?={word})))"
        return rf"^[^\w(\[]*(?i:(?:(?:{adverb}|{noun})\W+)*)(?P<run>{self.run}){after}"

    @property
    def stated(self) -> tuple[str, ...]:
        """Sentences that name the answer."""
        noun = r"\b(?:answer|option|choice|guess|letter|pick|one)(?:\s+(?:to|for|in)\b[^.,;\n]{0,60}?)?"
        noun += r"\s*(?:(?:is|was|would be|should be|must be|has to be)\b\s*[:=]?|[:=\-])"
        verb = r"\b(?:choose|chose|pick|select|going with|go with|go for|say|think|believe|guess|must be|but|it is|"
        verb += r"that is|it['’]s|that['’]s)\b\s*:?(?:\s+that\b)?(?:\s+(?:it|the answer) (?:is|was)\b|\s+it['’]s\b)?"
        adverb = r"(?:definitely|probably|likely|most likely|clearly|rather|obviously|certainly)\s+"
        before = rf"(?i:(?:{noun}|{verb})\s*(?:{adverb})?(?:(?:the\s+)?(?:option|choice|letter|answer)\s+)?)"
        after = r"(?i:\s+(?:is|was|must be|would be|has to be)\s+(?:clearly |definitely |probably |obviously )?"
        after += r"(?:the\s+)?(?:most\s+)?(?:correct|right|best|answer|true|accurate|likely)\b)"
        return f"{before}(?P<run>{self.run})", f"(?P<run>{self.run}){after}", rf"[.!?:;]\s+(?P<run>{self.run})\W*$"

    def listed(self, text: str) -> set[str]:
        """Letters with a mark behind, as a row of options has them: "A. red B. green"."""
        return {match[1] for match in re.finditer(r"(?<!\S)\(?([A-H])[.):](?=\s*\w)", text)}


@dataclass(frozen=True)
class _Clause:
    """A stretch of a text that asserts, denies, asks or gives a reason."""

    start: int
    end: int
    is_denied: bool
    is_weak: bool  # a reason or a question: it names the answer only where nothing else does


_Mention = tuple[int, re.Match]  # an option, and where its text stands in an answer


def parse_choice(text: str, num_options: int, options: Sequence[str] = ()) -> int | None:
    """0-based option that an answer names, or None where it names none, several or a contradiction.

    An option "" is absent: its letter is no answer.

    Read in this order: a label that opens a line or that a sentence states to be the answer ("the answer is A",
    "Answer: A", "B is correct"), a label in brackets, else the text of an option. What a clause denies does not count
    ("B, not A"; "A is wrong"), nor, beside something else, what stands in a reason or a question. Options that are
    only repeated name nothing. A label followed by the text of another option is a contradiction. Lower case counts as
    a label in brackets, after "answer" or "option", and alone at the start or end.
    """
    plain = _plain(text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}\n{text[-LONGEST // 2 :]}")
    labels, mentions = _Labels.of(num_options), _mentions(plain, options)
    clauses, masked = _clauses(plain, mentions)
    found, rest = _named(plain, labels, clauses, masked)
    if not found:
        return _option_by_text(plain, options, mentions, clauses)
    letter = ord(next(iter(found))) - ord("A")
    if len(found) > 1 or letter >= num_options or (options and not options[letter].strip()):
        return None
    said = normalise(_LEAD_IN.sub("", rest))
    contradicts = said and any(said == normalise(option) for i, option in enumerate(options) if i != letter)
    agrees = options and said == normalise(options[letter])
    return None if contradicts and not agrees else letter


def _plain(text: str) -> str:
    """The text without mark-up and with plain punctuation; lower-case letters that can only be labels as capitals."""
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c if c.isascii() else _ASCII.get(unicodedata.category(c), c) for c in text)
    text = re.sub(r"\\boxed\{\s*(?:\\text\{)?\s*([A-Za-z])\s*\}*", r"(\1)", text)
    text = re.sub(r"</?\w+>", "\n", text)
    text = re.sub(r"[*_`$\"“”#]+", "", text).strip()
    text = re.sub(r"(?i:\b(?:answer|option|choice)(?: is)?:? )(?:[b-h]\b|a(?=\W*$|[.,;:)]))(?!['’])", _raised, text)
    text = re.sub(r"(?:^|(?<=[:\s]))[a-h](?=\W*$)", _raised, text)
    return re.sub(r"^[a-h](?=[.):]\s)", _raised, text)


_ASCII = {"Po": ".", "Ps": "(", "Pe": ")"}  # of punctuation in other scripts, by category


def _raised(match: re.Match) -> str:
    return match[0][:-1] + match[0][-1].upper()


# ---- clauses


def _clauses(text: str, mentions: Sequence[_Mention]) -> tuple[list[_Clause], str]:
    """The clauses of a text, and the text with SPOKEN for options, whose own words deny nothing."""
    characters = list(_SURE.sub(lambda match: " " * len(match[0]), text))
    for _, match in mentions:
        characters[match.start() : match.end()] = SPOKEN * len(match[0])
    masked, found, start, is_reason = "".join(characters), [], 0, False
    for match in (*_BREAK.finditer(masked), None):
        end = match.start() if match else len(masked)
        content, mark = masked[start:end], match["end"] if match else None
        found.append(_Clause(start, end, bool(_NEGATED.search(content)), is_reason or mark == "?"))
        if len(found) > 1 and masked[start - 1] == "," and _RETRACTION.fullmatch(content):
            found[-2] = replace(found[-2], is_denied=True)  # "blue, no"
        if match:
            start, is_reason = (match.end(), False) if mark else (end, bool(match["reason"]))
    return found, masked


def _clause_at(clauses: Sequence[_Clause], place: int) -> _Clause:
    return clauses[bisect_right(clauses, place, key=lambda clause: clause.start) - 1]


# ---- labels and texts of options


def _named(text: str, labels: _Labels, clauses: Sequence[_Clause], masked: str) -> tuple[set[str], str]:
    """Letters of the labels that the text gives as its answer, and the text without them."""

    def clause_of(match: re.Match) -> _Clause:
        return _clause_at(clauses, match.start("run"))

    def matches(*patterns: str) -> list[re.Match]:
        every = [match for pattern in patterns for match in re.finditer(pattern, text, re.M)]
        return [match for match in every if not _is_denied(match, clause_of(match), masked)]

    def asserted(found: list[re.Match]) -> list[re.Match]:
        return [match for match in found if not clause_of(match).is_weak] or found

    leading, stated = matches(labels.leading), matches(*labels.stated)
    brackets, listed = matches(r"(?P<run>[(\[]\s*[A-Ha-h]\s*[)\]])"), labels.listed(text)
    is_list = len(_letters(leading + brackets, labels) | listed) > 1  # the options, repeated
    if stated:
        used = asserted(stated if is_list else stated + leading)
    elif len(listed) > 1:
        used = [match for match in leading if re.match(r"[^\w\n]*(?:\n|$)", text[match.end() :])]  # alone in a line
        if len(listed) < 3 or not used:
            return listed, ""
    else:
        used = asserted(leading + brackets)
    rest = text
    for match in used:
        rest = rest.replace(match[0], " ", 1)
    return _letters(used, labels), rest


def _letters(matches: Sequence[re.Match], labels: _Labels) -> set[str]:
    runs = (match["run"] for match in matches)
    return {letter.upper() for run in runs for one in re.findall(labels.one, run) for letter in re.findall(r"\w", one)}


def _is_denied(match: re.Match, clause: _Clause, masked: str) -> bool:
    """Whether a negation leads to a label ("I don't think the answer is B") or is said of it ("B is wrong")."""
    start, end = match.span("run")
    after = masked[end : max(end, clause.end)]
    is_said = bool(_PREDICATE.match(after) and _NEGATED.search(after))
    is_retracted = clause.is_denied and not _NEGATED.search(masked[clause.start : clause.end])
    return is_said or is_retracted or bool(_NEGATED.search(masked[clause.start : start]))


def _mentions(text: str, options: Sequence[str]) -> list[_Mention]:
    """Where the text has an option's words, whole and in order, and not as a part of a longer option's."""
    found = []
    for number, option in enumerate(options):
        spoken = normalise(option)
        pattern = r"\W+(?:(?:an?|the)\W+)?".join("['’]?".join(map(re.escape, word)) for word in spoken)
        first = r"(?<![-−])(?<!\d[.,])(?<!image )" if spoken and spoken[0][0].isdigit() else ""
        matches = re.finditer(rf"(?<!\w){first}{pattern}(?!\w)(?![.,]\d)", text, re.I) if spoken else ()
        found += [(number, match) for match in matches]
    return [(number, one) for number, one in found if not any(_is_inside(one, other) for _, other in found)]


def _is_inside(one: re.Match, other: re.Match) -> bool:
    """Whether a mention is a part of a longer one ("red" in "dark red")."""
    return one.span() != other.span() and other.start() <= one.start() and one.end() <= other.end()


def _option_by_text(
    text: str, options: Sequence[str], mentions: Sequence[_Mention], clauses: Sequence[_Clause]
) -> int | None:
    """The one option whose text the answer is, or mentions in whole words and does not deny."""
    spoken = [normalise(option) for option in options]
    first = normalise(re.split(r"[.,;!\n]", text, maxsplit=1)[0])
    for said in (normalise(text), normalise(_LEAD_IN.sub("", text)), first if POLAR & set(first) else ()):
        same = [number for number, option in enumerate(spoken) if said and said == option]
        if same:
            return same[0] if len(same) == 1 else None
    placed = [(option, _clause_at(clauses, match.start())) for option, match in mentions]
    denied = {option for option, clause in placed if clause.is_denied}
    asserted = [(option, clause.is_weak) for option, clause in placed if not clause.is_denied]
    stated = {option for option, is_weak in asserted if not is_weak}
    if not stated and not any(clause.is_denied for clause in clauses):
        stated = {option for option, _ in asserted}
    if not stated and len(denied) == 1 and len(spoken) == 2 and POLAR.issuperset(word for o in spoken for word in o):
        return 1 - denied.pop()  # "that is not true"
    return stated.pop() if len(stated) == 1 and not stated & denied else None


def same_text(text: str, options: Sequence[str]) -> list[int]:
    """0-based options whose text this is, up to what `normalise` drops."""
    return [number for number, option in enumerate(options) if normalise(option) == normalise(text)]


def true_choice(answer: str, choices: Sequence[str]) -> int:
    """0-based option that the record's true answer is: the text of one, else its letter. Raises ValueError."""
    same = same_text(answer, choices)
    letter = re.fullmatch(r"\W*([A-Za-z])\W*", answer)
    number = same[0] if len(same) == 1 else ord(letter[1].upper()) - ord("A") if letter and not same else -1
    if not 0 <= number < (len(choices) or NUM_LETTERS) or (choices and not choices[number]):
        limit = f"the {len(choices)} `choices`" if choices else "the letters A to H, and the record has no `choices`"
        raise ValueError(f"multiple choice: the true answer {answer!r} is not one of {limit}")
    return number


def _score_choice(text: str, answer: str, choices: Sequence[str]) -> Result:
    true = true_choice(answer, choices)
    given = parse_choice(text, len(choices) or NUM_LETTERS, choices)
    if given is None:
        return Result(0.0, UNPARSED)
    return Result(float(given == true), RIGHT if given == true else WRONG)
