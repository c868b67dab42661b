"""Tensors on disk: read without running code, every one accounted for by name and shape, and a digest of a folder."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file

from llava.run_folder import read_object

WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
UNREAD = ("*.msgpack", "*.h5", "*.onnx", "checkpoint-*/*")  # of a hub's repository; the last: of a training
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # in a header
SAMPLED_BYTES = 1 << 20


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
    for shard in _shards(folder, names):
        if shard.suffix == ".safetensors" and shard.is_file():
            with safe_open(shard, framework="pt") as file:
                found += file.keys()
        else:
            found += read_shard(shard)
    return found


def stored_numbers(folder: Path, names: Sequence[str] = WHOLE_FILES) -> Counter[torch.dtype]:
    """How many numbers of each precision a folder's tensors hold, without reading them. Raises FileNotFoundError."""
    found: Counter[torch.dtype] = Counter()
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
            if not isinstance(weight_map, dict):
                raise ValueError(f"{index}: it has no `weight_map`")
            return [folder / shard for shard in sorted(set(weight_map.values()))]
        if (folder / name).is_file():
            return [folder / name]
    raise FileNotFoundError(f"{folder}: no weights ({' or '.join(names)}, or an index of shards)")


def read_shard(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of one file. `.bin` files are unpickled with `weights_only=True`: an untrusted one cannot run code."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the index names this shard, but it is not there")
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


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
