"""Records against their pictures: what can be found wrong before any weight is loaded."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from llava.families import Family
from llava.image import ImageStore
from llava.records import DataError, Prompt
from llava.regions import needs_sizes, target_boxes, target_weights
from llava.runtime import Progress, is_main_process

DEPTHS = ("full", "header", "exists")


def check_pictures(records: Sequence[Prompt], store: ImageStore, family: Family | None, depth: str) -> None:
    """Look at every picture: `full` decodes, `header` reads sizes, `exists` looks whether it is there.

    Raises DataError with one line per record whose pictures are missing, damaged, or without the cell it points at;
    with a family also where the model does not see that cell.
    """
    looked_at = _look_at(store, {name for record in records for name in record.images}, depth)
    problems = []
    for record in records:
        found = [looked_at[name] for name in record.images]
        errors = [error for error in found if isinstance(error, Exception)]
        if errors:
            problems.append(f"{record.where}: {errors[0]}")
        elif depth != "exists":
            problems += _target_problem(record, found, family)
    if problems:
        raise DataError(problems)


def _look_at(store: ImageStore, names: Iterable[str], depth: str) -> dict[str, tuple[int, int] | Exception | None]:
    """Size of every picture (None where nobody asked), or what is wrong with it."""

    def look(name: str) -> tuple[int, int] | Exception | None:
        try:
            if depth != "exists":
                return store.open(name).size if depth == "full" else store.size(name)
            store.stamp(name)
        except (OSError, ValueError) as error:
            return error
        return None

    names = sorted(names)
    with ThreadPoolExecutor() as pool:
        quiet = not is_main_process() or len(names) < 1000
        found = list(Progress(pool.map(look, names), total=len(names), desc="checking pictures", disable=quiet))
    return dict(zip(names, found, strict=True))


def _target_problem(record: Prompt, sizes: list[tuple[int, int]], family: Family | None) -> list[str]:
    try:
        if family:
            target_weights(record, family.images(sizes))
        elif needs_sizes(record):
            target_boxes(record, sizes[0])
    except ValueError as error:
        return [str(error) if family else f"{record.where}: {error}"]
    return []
