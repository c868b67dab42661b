"""Tensors on disk: read without running code, every one accounted for by name and shape, and a digest of a folder."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from llava.run_folder import read_object

WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
UNREAD = ("*.msgpack", "*.h5", "*.onnx", "checkpoint-*/*")  # of a hub's repository; the last: of a training
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # in a header
SAMPLED_BYTES = 1 << 20
# What transformers and peft read beside the tensors, as they like.
SETTINGS = (
    "config", "generation_config", "adapter_config", "processor_config", "preprocessor_config", "tokenizer",
    "tokenizer_config", "special_tokens_map", "added_tokens", "chat_template",
)  # fmt: skip
LEGACY = b"\x80\x02\x8a\x0a"  # how torch's files began before they were zip archives
NO_WEIGHTS = {b"version https://git-lfs": "a git-lfs pointer (git lfs pull)", b"<": "a web page"}


def check_settings(folder: Path) -> None:
    """Raises ValueError naming a file of settings that holds no JSON object."""
    for path in (folder / f"{name}.json" for name in SETTINGS):
        if path.exists():
            read_object(path)


def local_folder(path: str) -> Path:
    """The checkpoint's folder here: itself, or the hub's snapshot."""
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, ignore_patterns=UNREAD))
    except Exception as error:  # the hub client raises many kinds: offline, unknown name, no access
        reason = first_line(error)
        raise FileNotFoundError(f"{path}: not a folder here, and the hub did not give it ({reason})") from error


def read_tensors(folder: Path, names: Sequence[str] = WHOLE_FILES) -> dict[str, torch.Tensor]:
    """All tensors of a folder: sharded or single, safetensors or .bin. Raises FileNotFoundError if there are none."""
    return {name: tensor for shard in _shards(folder, names) for name, tensor in read_shard(shard).items()}


def tensor_names(folder: Path, names: Sequence[str] = WHOLE_FILES) -> list[str]:
    """Names of all tensors of a folder, without reading their numbers. Raises FileNotFoundError."""
    found: list[str] = []
    check_shards(folder, names)
    for shard in _shards(folder, names):
        if shard.suffix == ".safetensors" and shard.is_file():
            with safe_open(shard, framework="pt") as file:
                found += file.keys()
        else:
            found += read_shard(shard)
    return found


def stored_numbers(folder: Path, names: Sequence[str] = WHOLE_FILES) -> Counter[torch.dtype]:
    """How many numbers of each precision a folder's tensors hold, without reading them. Raises like `check_shards`."""
    found: Counter[torch.dtype] = Counter()
    check_shards(folder, names)
    for shard in _shards(folder, names):
        if shard.suffix == ".safetensors" and shard.is_file():
            with safe_open(shard, framework="pt") as file:
                for piece in map(file.get_slice, file.keys()):
                    found[FLOATS.get(piece.get_dtype(), torch.uint8)] += math.prod(piece.get_shape())
        else:
            for tensor in read_shard(shard).values():
                found[tensor.dtype] += tensor.numel()
    return found


def _shards(folder: Path, names: Sequence[str]) -> list[Path]:
    for name in names:
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = read_object(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
                raise ValueError(f"{index}: it has no `weight_map` of names of files by tensor")
            shards = sorted(set(weight_map.values()))
            if outside := [shard for shard in shards if Path(shard).name != shard or "\\" in shard]:
                raise ValueError(f"{index}: the shard {outside[0]} must lie beside it")
            return [folder / shard for shard in shards]
        if (folder / name).is_file():
            return [folder / name]
    raise FileNotFoundError(f"{folder}: no weights ({' or '.join(names)}, or an index of shards)")


def read_shard(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of one file. `.bin` files are unpickled with `weights_only=True`: an untrusted one cannot run code.

    Raises ValueError naming a file that holds none, FileNotFoundError.
    """
    start = _start(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=not start.startswith(LEGACY))
    except Exception as error:  # of torch, pickle, zipfile and safetensors
        raise ValueError(f"{path}: cannot be read as tensors ({first_line(error)}); get the file again") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise ValueError(f"{path}: holds something else than tensors by name")
    return found


def check_shards(folder: Path, names: Sequence[str] = WHOLE_FILES) -> None:
    """Raises ValueError or FileNotFoundError naming a file of weights that is missing or cut off, or is none."""
    for path in _shards(folder, names):
        _start(path)
        try:
            if path.suffix == ".safetensors":
                safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read as tensors ({first_line(error)}); get the file again") from error


def check_numbers(where: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError naming the tensors that hold NaN or infinity, which would answer nothing."""
    real = {name: t for name, t in tensors.items() if t.is_floating_point() and not t.is_meta and t.numel()}
    if wrong := [name for name, t in real.items() if not torch.isfinite(torch.sum(t, dtype=torch.float32))]:
        raise ValueError(f"{where}: no numbers (NaN or infinity) in tensors: {first_names(wrong)}")


def _start(path: Path) -> bytes:
    """The first bytes of a file of weights. Raises ValueError for what takes its place, FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the index names this shard, but it is not there")
    with path.open("rb") as file:
        start = file.read(64)
    what = next((what for sign, what in NO_WEIGHTS.items() if start.lstrip().startswith(sign)), "")
    if what or not start:
        raise ValueError(f"{path}: {what or 'an empty file'} in place of the weights; get the file again")
    return start


def account(where: str, wanted: Mapping[str, torch.Size], given: Mapping[str, torch.Size]) -> None:
    """Raises ValueError naming every tensor that is missing, unexpected, or of another shape."""
    both = [name for name in wanted if name in given]
    refuse(
        where,
        [name for name in wanted if name not in given],
        [name for name in given if name not in wanted],
        [(name, given[name], wanted[name]) for name in both if given[name] != wanted[name]],
    )


def refuse(where: str, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable) -> None:
    """Raises ValueError if any name is given; mis-shaped tensors are (name, shape in the file, shape in the model)."""
    misshapen = [f"{name} {tuple(found)}, the model has {tuple(wanted)}" for name, found, wanted in mismatched]
    problems = [
        f"{kind} tensors: {first_names(names)}"
        for kind, names in (("missing", list(missing)), ("unexpected", list(unexpected)), ("mis-shaped", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"{where}: the weights do not fit the config; {'; '.join(problems)}")


def first_names(names: Iterable[str]) -> str:
    """The first five names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def first_line(error: Exception) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def reason(error: Exception) -> str:
    """What an error says in a line, with its kind where that is not of bad input."""
    kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
    return kind + first_line(error)


def share(folder: Path) -> None:
    """Give the files of tensors below a folder the permissions that files get here: safetensors' are their owner's."""
    os.umask(mask := os.umask(0))
    for path in folder.rglob("*.safetensors"):
        with suppress(OSError):  # of file systems without permissions
            path.chmod(0o666 & ~mask)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Raises a ValueError naming the path for whatever libraries raise where settings are of strange types."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        said = reason(error)
        raise ValueError(said if said.startswith(str(path)) else f"{path}: {said}") from error


def digest(paths: Sequence[str]) -> str:
    """Hash of what decides the weights and settings of checkpoints: an adapter, and those below it.

    A file counts with its name, its size and its first and last mebibyte; a hub name with itself alone.
    """
    parts: list = []
    for path in paths:
        files = [file for file in Path(path).glob("*") if file.suffix in (".safetensors", ".bin", ".json")]
        parts += [(file.name, file.stat().st_size, _ends(file)) for file in sorted(files)] or [path]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _ends(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(SAMPLED_BYTES)
        file.seek(max(0, path.stat().st_size - SAMPLED_BYTES))
        return hashlib.sha256(head + file.read()).hexdigest()
