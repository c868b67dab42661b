"""Texts of others in our messages: a file's content must not end a line, steer a terminal or fill a screen."""

LONGEST = 460  # characters of a message; what is wrong comes first and the cure last


def one_line(text: str, longest: int = LONGEST) -> str:
    """The text in a line of printable characters, others escaped; of a long one the middle is left out."""
    if len(text) > longest:
        end = longest // 3
        text = f"{text[: longest - end - 5]} ... {text[-end:]}"
    line = printable(text)
    return line if len(line) <= longest or line == text else one_line(line, longest)


def printable(text: str) -> str:
    """The text with everything escaped that is no visible character or blank."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
