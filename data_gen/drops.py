"""What is left out of a data set and why: every record that is dropped is counted and listed."""

from dataclasses import asdict, dataclass
from typing import Any


class Unusable(ValueError):
    """A record or picture that cannot be used. `reason` is the short name it is counted under.

    `is_bad` tells input that is wrong (missing, damaged, malformed) from input that a rule leaves out.
    """

    def __init__(self, reason: str, detail: str, is_bad: bool = True):
        self.reason, self.detail, self.is_bad = reason, detail, is_bad
        super().__init__(f"{reason}: {detail}")


@dataclass(frozen=True)
class Drop:
    """One line of dropped.jsonl."""

    id: str  # of the source record
    where: str  # its file and number
    reason: str
    detail: str
    is_bad: bool
    prompt: str | None = None  # id of a prompt that was made all the same, with another companion

    @classmethod
    def of(cls, error: Unusable, source: Any, prompt: str | None = None) -> "Drop":
        """The line for an error that ended the use of a record, whose `id` and `where` the source has."""
        return cls(source.id, source.where, error.reason, error.detail, error.is_bad, prompt)

    def as_dict(self) -> dict[str, Any]:
        """Fields as they are written; `prompt` only where there is one."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}: {self.detail}"
