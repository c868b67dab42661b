"""The output folder of a training: what it must not be, and what lies beside the weights, for people to look at."""

import os
from collections.abc import Mapping
from pathlib import Path

MODEL_FILES = ("config.json", "adapter_config.json")


def check_place(folder: Path, models: Mapping[str, str | None], data: Mapping[str, str | None]) -> None:
    """Raises ValueError where a training would write over what it reads, by flag, or over a model that is not its own.

    Nothing may be written into the folder of a model; other places must only not be the same. Raises OSError where
    the folder cannot be made or written.
    """
    place = folder.resolve()
    for flag, path in {**models, **data}.items():
        own = Path(path).resolve() if path and Path(path).exists() else None
        if own and (place == own or (flag in models and own in place.parents)):
            raise ValueError(f"--output_dir {folder} would write over --{flag} {path}: choose a folder outside of it")
    if not (folder / "run.json").is_file():
        for name in MODEL_FILES:
            if (folder / name).is_file():
                raise ValueError(f"--output_dir {folder} holds another model ({name}): choose another folder")
    there = next(path for path in (place, *place.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(None, f"{there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(None, f"{there} is not yours to write")
