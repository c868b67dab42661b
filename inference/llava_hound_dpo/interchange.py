"""Public multi-image data sets in, answers out to the harnesses that score them.

python -m inference.llava_hound_dpo.interchange
  import --from blink --source FOLDER --split val --output DIR
    writes DIR/test.json and DIR/images from files on this machine; nothing is downloaded
  export --to vlmevalkit --answers answers.jsonl --questions DIR/test.json --output MODEL_BLINK.tsv
    writes a prediction table (vlmevalkit) or a sample log (lmms_eval)
"""

import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inference.llava_hound_dpo.interchange_formats import COLUMNS, item_of, prompt_of, region_of
from inference.llava_hound_dpo.interchange_readers import Row, picture_file, read_rows
from inference.llava_hound_dpo.interchange_writers import WRITERS, export
from llava.command_line import command, flag, parse
from llava.records import read_questions, refuse_duplicates
from llava.runtime import setup_logging, user_errors, write_bytes, write_run_json, write_text

log = logging.getLogger(__name__)

INCOMPLETE = 1  # exit code: written, but without the records that could not be converted
SHOWN = 20  # problems in the log; run.json has all


@dataclass(frozen=True)
class Import:
    """A data set becomes a test set."""

    _argument_group_name = "import"
    source_name: str = flag("which data set it is", aliases=["--from"], choices=list(COLUMNS))
    source: Path = flag("file, folder of files, or folder of save_to_disk")
    output: Path = flag("folder for test.json, images and run.json")
    split: str | None = flag("one of several: val, or Art_Style/val of a folder of subsets", None)
    image_folder: Path | None = flag("where the paths of pictures begin (default: beside --source)", None)
    strict: bool = flag("stop at the first record that cannot be converted", False)


@dataclass(frozen=True)
class Export:
    """Answers become a harness's predictions."""

    _argument_group_name = "export"
    to: str = flag("which harness scores them", choices=list(WRITERS))
    answers: Path = flag("answers.jsonl of one model")
    questions: Path = flag("the imported test.json")
    output: Path = flag("vlmevalkit: .tsv, .json; lmms_eval: .jsonl, .json")
    original: Path | None = flag("vlmevalkit: its TSV, for its columns and every one of its rows", None)
    task: str | None = flag("lmms_eval, for a .json: the name of the task", None)


def main(argv: Sequence[str] | None = None) -> None:
    """Import or export, and say what was left out."""
    setup_logging()
    with user_errors():
        name, rest = command(argv, ("import", "export"), __doc__)
        (settings,) = parse((Import if name == "import" else Export,), __doc__, rest)
    if name == "import":
        import_command(settings)
        return
    with user_errors():
        count = export(**asdict(settings))
    log.info("%d answers in %s", count, settings.output)


# ---- import


@dataclass
class Imported:
    """The records of a test set, and a line for each that is not in it."""

    records: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def import_command(settings: Import) -> None:
    """Import a test set; exit code 1 where records could not be converted, 2 where none could."""
    with user_errors():
        if settings.output.exists() and not settings.output.is_dir():
            raise NotADirectoryError(f"--output {settings.output} is a file; give a folder")
        found = import_set(
            settings.source_name, settings.source, settings.output, settings.split, settings.image_folder,
            settings.strict,
        )  # fmt: skip
        if not found.records:
            first = f"; the first: {found.problems[0]}" if found.problems else ""
            raise ValueError(f"{settings.source}: none of {len(found.problems)} records could be converted{first}")
        refuse_duplicates([(record["id"], f"record {n}") for n, record in enumerate(found.records, 1)])
        write_text(
            settings.output / "test.json", json.dumps(found.records, indent=1, ensure_ascii=False, default=str) + "\n"
        )
        read_questions(settings.output / "test.json")  # what was written must be what the other stages read
    write_run_json(
        settings.output / "run.json", arguments=asdict(settings), counts=counts(found), problems=found.problems
    )
    for line in found.problems[:SHOWN]:
        log.info("not converted: %s", line)
    log.info("%s in %s", json.dumps(counts(found)), settings.output / "test.json")
    if found.problems:
        log.info("%d records are missing there; all reasons in %s", len(found.problems), settings.output / "run.json")
        sys.exit(INCOMPLETE)


def counts(found: Imported) -> dict[str, Any]:
    """Records read, converted and not, and how those that were are made."""
    return {
        "read": len(found.records) + len(found.problems),
        "converted": len(found.records),
        "not converted": len(found.problems),
        "multiple choice": sum("choices" in record for record in found.records),
        **Counter(record["image_type"] for record in found.records),
    }


def import_set(
    name: str, source: Path, output: Path, split: str | None = None, image_folder: Path | None = None,
    is_strict: bool = False,
) -> Imported:  # fmt: skip
    """Convert every record of a data set and store its pictures in `output`/images.

    Raises ValueError at the first that cannot be converted with `is_strict`; FileNotFoundError, DataError, ValueError
    where the source cannot be read at all.
    """
    found, ids = Imported(), Counter()
    folder = image_folder or (source if source.is_dir() else source.parent)
    for number, row in enumerate(read_rows(source, split), 1):
        try:
            found.records.append(convert(name, row, number, folder, output))
        except ValueError as error:
            problem = f"{row.where}{_label(name, row)}: {error}"
            if is_strict:
                raise ValueError(problem) from error
            found.problems.append(problem)
            continue
        record = found.records[-1]
        ids[record["id"]] += 1
        record["id"] += f"#{ids[record['id']]}" if ids[record["id"]] > 1 else ""
    return found


def convert(name: str, row: Row, number: int, folder: Path, output: Path) -> dict[str, Any]:
    """The test-set record of a row, its pictures stored. Raises ValueError saying what is wrong with it."""
    item = item_of(name, row.fields)
    prompt, shown = prompt_of(item)
    files = [_picture(n, value, folder) for n, value in enumerate(item.images, 1)]
    paths = [f"{number:06d}_{n}{extension}" for n, (_, extension) in enumerate(files, 1)]
    for path, (content, _) in zip(paths, files, strict=True):
        write_bytes(output / "images" / path, content)
    return {
        "id": item.index,
        "image": [paths[n] for n in shown],
        "prompt": prompt,
        "answer": item.answer,
        **({"choices": [option or None for option in item.options]} if item.options else {}),
        **region_of(prompt, len(shown)),
        "source": name,
        "source_index": item.index,
        "source_row": row.number,
        "source_fields": {key: row.fields[key] for key in row.fields if not re.fullmatch(COLUMNS[name].images, key)},
    }


def _picture(number: int, value: Any, folder: Path) -> tuple[bytes, str]:
    try:
        return picture_file(value, folder)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"picture {number}: {error}") from error


def _label(name: str, row: Row) -> str:
    columns = COLUMNS[name].index.split("|") if isinstance(row.fields, dict) else ()
    return next((f" (id {row.fields[column]})" for column in columns if column in row.fields), "")


if __name__ == "__main__":
    main()
