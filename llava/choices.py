"""Which option of a multiple-choice question an answer names, read clause by clause: pure functions of text."""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llava.words import NUMERALS, normalise

NUM_LETTERS = 8  # A to H are read as labels even where fewer options exist; one without an option is refused
LONGEST = 10_000  # characters of an answer that are read; of a longer one, the beginning and the end
_SLANG = {"yes": ("yeah", "yep", "yup"), "no": ("nope", "nah")}
POLAR = {"yes", "no", "true", "false"}
SPOKEN = "\ue000"  # stands for every character of an option's text, where only what is said around it is read
_AFTER_LABEL_A = "because|since|as|and|or|is|was|with|for|but|in|not|rather|instead|due|fits|matches|describes"
_AFTER_LABEL_A += r"|seems|looks|over|only|alone|without|would|must|should|could|can|has|it|I|\w+ly(?=\W*$)"
_REASON = r"because|since|due to|given that|if|unless|for (?=it|the|there)"
_REASON += "|as (?=it|the|they|this|that|there|both|only|all)"
_CONTRAST = r"instead of|rather than|as opposed to|unlike|(?<!other )than|nor|and not"
_CONTRAST += r"|not(?= +(?:an? +|the +|option +)?(?:[\ue000(]|(?-i:[A-H]\b)))"  # "B not A"
_NEGATED = re.compile(
    rf"\b(?:{_CONTRAST}|not|no|nope|none|never|neither|cannot|without|incorrect|wrong|false|untrue|except|impossible|"
    r"rule[ds]? out|ruling out|eliminat\w+|exclud\w+|is out|are out|(?:\w+thing|all|any|none) but"
    r"|(?:is|are|was|were|do|does|did|ca|wo)nt)\b|n['’]t\b",
    re.I,
)
_CROSSED_OUT = re.compile(  # "A: no", "A (wrong)", "A. red - incorrect", of what follows a label
    r"[ :\-–—(]*(?:\.? *\ue000+[ :\-–—(,]*)?"
    r"(?:(?:no|nope|wrong|incorrect|false|untrue)(?=\W*(?:[,.;)\n]|$))|[✗✘❌])",
    re.I,
)
_SURE = re.compile(r"\b(?:no|without (?:an?y? )?|beyond (?:an?y? )?) ?(?:doubt|question)\b|\bnot only\b", re.I)
_ROW = re.compile(r"^(?:[,/& ]*(?:\b(?:and|or|nor)\b)?[ (]*\b[A-H]\b\)?)+")  # of labels, behind the first
_IN_A_ROW = r"(?<=\ue000,) *(?:and |or )?\ue000"  # of options, behind a comma
_IN_A_ROW += r"|(?-i:(?<=\b[A-H],) *(?:and |or |nor )?[A-H]\b(?! +(?!and\b|or\b|are\b|were\b)[a-z]))"
_BREAK = re.compile(  # what ends a clause, or opens one
    rf"(?P<end>\.(?!\d)|[!?;\n]|,(?!(?<=\d,)\d|{_IN_A_ROW})|(?<=\ue000):|(?<=\bno):)"
    rf"|\b(?:(?P<reason>{_REASON})|{_CONTRAST}|(?<!thing )(?<!all )(?<!any )(?<!none )but|while|whereas|although|though"
    r"|however|so|actually|(?<=\ue000 )that|and(?= +(?:choose|pick|select|go|say)\b|(?= +\S+ +(?:is|was)\b)))\b",
    re.I,
)
_PREDICATE = re.compile(
    r"\s*(?:is|are|was|can|could|do|does|would|should|must|may|has|looks?|seems?|sounds?|n['’]t)", re.I
)
_DETERMINER = re.compile(r"\w no (?!(?:because|since|as|and|or|it|they|there|that|this|the|i|not|but)\b)\w", re.I)
_RETRACTION = re.compile(r"\W*(?:(?:no|nope|not|wrong|false|wait|sorry)\b\W*)+", re.I)
_CORRECTING = (",", "?", ":", "..")  # before a retraction
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
        bare = rf"\b(?:[B-{last}]|A{article})(?![\w'’+])"
        one = rf"(?:[(\[]\s*[A-{last}a-{last.lower()}]\s*[)\]]|{bare})"
        return cls(one, rf"{one}(?:\s*(?:,|[/&+]|\bor\b|\band\b|\bas well as\b)\s*{one}){{0,30}}")

    @property
    def opening(self) -> str:
        """A label, or a row of them, behind nothing, adverbs or "the option"."""
        adverb = r"\w+ly|so|thus|hence|therefore|maybe|perhaps|only|just|but|then"
        noun = r"(?:the\s+)?(?:(?:correct|right|best|final)\s+)?(?:answer|option|choice|letter)"
        return rf"[^\w(\[]*(?i:(?:(?:{adverb}|{noun})\W+)*)(?P<run>{self.run})"

    @property
    def leading(self) -> str:
        """A label that opens a line: "A", "A.", "A)", "(A)", "A: red", "B - red", "B (red)"."""
        return rf"^{self.opening}(?:\W*$|\s*[.):\],;!?]+(?=\s|$)|\s+[-–—(=→|]|(?<=[)\]]))"

    @property
    def stated(self) -> tuple[str, ...]:
        """Sentences that name the answer."""
        noun = r"\b(?:answer|option|choice|guess|letter|pick|one|respuesta|antwort|réponse|resposta|risposta|ответ)"
        noun += r"(?:\s+(?:to|for|in)\b[^.,;\n]{0,60}?)?"
        noun += r"\s*(?:(?:is|was|(?:would|could|should|must|has to|might|may) be|es|ist|est|é|è)\b\s*[:=]?|[:=\-])"
        verb = r"\b(?:choose|chose|pick|select|going with|go with|go for|say|think|believe|guess|but"
        verb += r"|(?:must|could|might|may) be|it is|that is|is it|it['’]s|that['’]s)\b\s*:?(?:\s+that\b)?"
        verb += r"(?:\s+(?:it|the answer) (?:is|was)\b|\s+it['’]s\b)?"
        adverb = r"(?:definitely|probably|likely|most likely|clearly|rather|obviously|certainly)\s+"
        before = rf"(?i:(?:{noun}|{verb})\s*(?:{adverb})?(?:(?:the\s+)?(?:option|choice|letter|answer)\s+)?)"
        after = r"(?i:\s+(?:is|was|must be|would be|has to be)\s+(?:clearly |definitely |probably |obviously )?"
        after += r"(?:the\s+)?(?:most\s+)?(?:correct|right|best|answer|true|accurate|likely)\b)"
        at_end = rf"(?::\s*|[.!?;]\s+)(?P<run>{self.run})\W*$"
        return f"{before}(?P<run>{self.run})", f"(?P<run>{self.run}){after}", at_end

    @property
    def listed(self) -> tuple[str, ...]:
        """Labels as a list of options has them: "A. red B. green", "a) red", "A - red, B - green"."""
        return r"(?<!\S)\(?(?P<run>[A-H])[.):](?=\s*\w)", r"(?<!\S)(?P<run>[A-Ha-h])(?:[.)]| +[-–—=])(?=\s+\w)"

    @property
    def bracketed(self) -> str:
        """ "(A)", "[b]"."""
        return r"(?P<run>[(\[]\s*[A-Ha-h]\s*[)\]])"


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

    Read in this order: a label that opens a line or is a whole clause, or that a sentence states to be the answer ("the
    answer is A", "Answer: A", "B is correct"), else the text of an option and what a clause is about ("B looks right").
    What a clause denies does not count ("B, not A"; "A is wrong"; "A: no"), nor, beside something else, what stands in
    a reason, a condition or a question. Options that are only repeated name nothing. A label followed by the text of
    another option is a contradiction. Lower case counts as a label in brackets, after "answer" or "option", and alone
    at the start or end.
    """
    plain = _plain(text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}\n{text[-LONGEST // 2 :]}")
    labels, mentions = _Labels.of(num_options), _mentions(plain, options)
    clauses, masked = _clauses(plain, mentions)
    found = _Found.of(plain, labels, clauses, masked)
    if found.listed:
        return None
    named = {ord(letter) - ord("A") for letter in _letters(found.plain or found.worded, labels)}
    if not found.plain:
        named |= {_option_by_text(plain, options, mentions, clauses)} - {None}
    number = named.pop() if len(named) == 1 else num_options
    if number >= num_options or (options and not options[number].strip()):
        return None
    for match in found.plain:
        plain = plain.replace(match[0], " ", 1)
    said = same_text(_LEAD_IN.sub("", plain), options) if found.plain and normalise(plain) else []
    return number if not said or number in said else None


def _plain(text: str) -> str:
    """The text without mark-up and with plain punctuation; lower-case letters that can only be labels as capitals."""
    text = unicodedata.normalize("NFKC", text)
    text = "".join(c if c.isascii() else _ASCII.get(unicodedata.category(c), c) for c in text)
    text = re.sub(r"\\boxed\{\s*(?:\\\w+\{)?\s*([A-Za-z])\s*\}*", r"(\1)", text)
    text = re.sub(r"\\(?:\w{2,}\{([^{}]*)\}|[()\[\]]|n(?!\w))", r" \1 ", text)
    text = re.sub(r"^\s*<([A-H])>\s*$", r"\1", text)
    text = re.sub(r"</?\w+>", "\n", text)
    text = re.sub(r"(?<!\w)['‘’]|['‘’](?!\w)|[*_`$\"“”#]+", "", text).strip()
    text = re.sub(rf"(?<=[{_CASELESS}])(?<!不|非)(?<!不是|不选)(?=[A-H](?![A-Za-z]))", "\n", text)
    text = re.sub(rf"(?<![A-Za-z{_CASELESS}])([A-H]) ?(?!ではな|じゃな|不|错)(?=[{_CASELESS}])", r"\1\n", text)
    text = re.sub(r"(?i:\b(?:answer|option|choice)(?: is)?:? )(?:[b-h]\b|a(?=\W*$|[.,;:)]))(?!['’])", _raised, text)
    text = re.sub(r"(?:^|(?<=[:\s]))[a-h](?=\W*$)", _raised, text)
    return re.sub(r"^[a-h](?=[.):]\s)", _raised, text)


_CASELESS = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts that put no space before a label
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
        is_corrected = masked.endswith(_CORRECTING, 0, start) or "wait" in content.lower()
        if is_corrected and _RETRACTION.fullmatch(content):
            said = [n for n, clause in enumerate(found[:-1]) if masked[clause.start : clause.end].strip()]
            if said:
                found[said[-1]] = replace(found[said[-1]], is_denied=True)  # "blue, no"
        if match:
            start, is_reason = (match.end(), False) if mark else (end, bool(match["reason"]))
    return found, masked


def _clause_at(clauses: Sequence[_Clause], place: int) -> _Clause:
    return clauses[bisect_right(clauses, place, key=lambda clause: clause.start) - 1]


# ---- labels and texts of options


@dataclass(frozen=True)
class _Found:
    """The labels that a text does not deny, by how they stand in it."""

    plain: list[re.Match]  # given as the answer
    worded: list[re.Match]  # the subject of a clause: "B has the right colour"
    listed: bool = False  # options are only repeated: nothing is given

    @classmethod
    def of(cls, text: str, labels: _Labels, clauses: Sequence[_Clause], masked: str) -> "_Found":
        """Of the ways in which labels are given the first that has one outside of reasons and questions, else any."""

        def clause_of(match: re.Match) -> _Clause:
            return _clause_at(clauses, match.start("run"))

        def kept(found: Iterable[re.Match]) -> list[re.Match]:
            return [match for match in found if not _is_denied(match, clause_of(match), masked)]

        def matches(*patterns: str) -> list[re.Match]:
            return kept(match for pattern in patterns for match in re.finditer(pattern, text, re.M))

        def opening(after: str) -> list[re.Match]:
            pattern = re.compile(labels.opening + after)
            return kept(found for c in clauses if (found := pattern.match(text, c.start, c.end)))

        leading, stated, brackets = matches(labels.leading), matches(*labels.stated), matches(labels.bracketed)
        alone, worded = opening(r"\W*$"), opening(r"\s+(?!and\b|or\b)\w")
        listed = _letters([match for pattern in labels.listed for match in re.finditer(pattern, text)], labels)
        ways = [leading + brackets + alone]
        if stated:
            is_list = len(_letters(leading + brackets, labels) | listed) > 1
            ways = [stated] if is_list else [stated + leading, *ways]
        elif len(listed) > 1:
            in_lines = [match for match in leading if re.match(r"[^\w\n]*(?:\n|$)", text[match.end() :])]
            uncrossed = matches(*labels.listed)
            if len(_letters(uncrossed, labels)) != 1 and (len(listed) < 3 or not in_lines):
                return cls([], [], True)
            ways = [uncrossed if len(_letters(uncrossed, labels)) == 1 else in_lines]
        sure = ([match for match in way if not clause_of(match).is_weak] for way in ways)
        return cls(next(filter(None, sure), ways[0]), worded)


def _letters(matches: Sequence[re.Match], labels: _Labels) -> set[str]:
    runs = (match["run"] for match in matches)
    return {one.strip("()[] ").upper() for run in runs for one in re.findall(labels.one, run) or [run]}


def _is_denied(match: re.Match, clause: _Clause, masked: str) -> bool:
    """Whether a negation leads to a label ("I don't think the answer is B") or is said of it ("B is wrong")."""
    start, end = match.span("run")
    after = _ROW.sub("", masked[end : max(end, clause.end)])
    is_said = _CROSSED_OUT.match(masked, end) or (_PREDICATE.match(after) and _NEGATED.search(after))
    is_retracted = clause.is_denied and not _NEGATED.search(masked[clause.start : clause.end])
    return bool(is_said or is_retracted or _NEGATED.search(masked[clause.start : start]))


def _mentions(text: str, options: Sequence[str]) -> list[_Mention]:
    """Where the text has an option's words, whole and in order, and not as a part of a longer option's."""
    found = []
    for number, option in enumerate(options):
        spoken = normalise(option)
        pattern = r"\W+(?:(?:an?|the)\W+)?".join(map(_word_pattern, spoken))
        first = r"(?<![-−–])(?<!\d[.,/])(?<!ty[ -])(?<!image )" if spoken and spoken[0][0].isdigit() else ""
        last = r"(?!\w)(?![.,/:]\d|-ish\b| ?[-–] ?\d)"
        matches = re.finditer(rf"(?<!\w){first}{pattern}{last}", text, re.I) if spoken else ()
        found += [(number, match) for match in matches]
    sure = [match.span() for match in _SURE.finditer(text)]
    return [
        (number, one) for number, one in found
        if not any(_is_inside(one, other) for _, other in found) and not any(a <= one.start() < b for a, b in sure)
    ]  # fmt: skip


def _word_pattern(word: str) -> str:
    """What a text may have for a word of an option: "1,000" for 1000, "two" for 2, "yeah" for yes."""
    between = ",?" if word.isdigit() else "['’]?"
    ways = [word, *(name for name, digits in NUMERALS.items() if digits == word), *_SLANG.get(word, ())]
    return f"(?:{'|'.join(between.join(map(re.escape, way)) for way in ways)})"


def _is_inside(one: re.Match, other: re.Match) -> bool:
    """Whether a mention is a part of a longer one ("red" in "dark red")."""
    return one.span() != other.span() and other.start() <= one.start() and one.end() <= other.end()


def _option_by_text(
    text: str, options: Sequence[str], mentions: Sequence[_Mention], clauses: Sequence[_Clause]
) -> int | None:
    """The one option whose text the answer is, or mentions in whole words and does not deny."""
    spoken = [normalise(option) for option in options]
    first = normalise(re.split(r"[.,;!\n]", text, maxsplit=1)[0])
    is_polar = POLAR.issuperset(first[:1]) and not POLAR & set(first[1:])  # "no they are not"
    for said in (normalise(text), normalise(_LEAD_IN.sub("", text)), first[:1] if is_polar else ()):
        same = [number for number, option in enumerate(spoken) if said and said == option]
        if same:
            return same[0] if len(same) == 1 else None
    placed = [(option, match, _clause_at(clauses, match.start())) for option, match in mentions]
    denied = {option for option, _, clause in placed if clause.is_denied}
    asserted = [
        (option, clause.is_weak or bool(_DETERMINER.match(text, max(0, match.start() - 2))))
        for option, match, clause in placed
        if not clause.is_denied
    ]
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
