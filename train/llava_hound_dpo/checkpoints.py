"""Checkpoints that go on with any number of processes: which one to continue from, and DeepSpeed's state in them.

DeepSpeed's own checkpoint holds one pickled partition of the optimiser per process and is read by as many processes
only. Here every trained parameter is stored whole and by name: its fp32 value and its optimiser states, in safetensors,
shared out over the files of the processes that wrote them. Without DeepSpeed the Trainer's own files already are so.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer_utils import rotate_checkpoints

from llava import run_folder
from llava.runtime import write_text
from llava.weights import first_line, share

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"  # written last into a checkpoint: without it a kill interrupted the saving
STATE = "deepspeed_state"  # folder of a checkpoint: tensors by parameter, and what belongs to none
NUMBERS = "numbers.pt"
MASTER = "fp32"  # the parameter itself, beside the names of the optimiser's states
SHARD_BYTES = 2 * 1024**3  # a process holds so much of other processes' partitions at a time
COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read as these flags want it."""


class DiskError(OSError):
    """A file that could not be written: the disk is full, or takes none so large."""


@contextmanager
def whole_or_nothing(folder: Path, files: str | None = None) -> Iterator[None]:
    """Raises DiskError, and deletes the folder or these files of it, where torch, safetensors or we cannot write."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # where torch writes its files
            raise
        for file in folder.glob(files) if files else ():
            file.unlink()
        if not files:
            shutil.rmtree(folder, ignore_errors=True)
        raise DiskError(
            f"{folder} could not be written ({first_line(error)}), what there was of it is removed: make room, and the "
            "same command goes on from the newest checkpoint"
        ) from error


def latest_checkpoint(
    output_dir: str | Path, identity: Mapping[str, Any], flags_for: Callable[[int], str] | None = None
) -> Path | None:
    """The newest complete checkpoint of this experiment, or None.

    A checkpoint that a kill interrupted is passed over with a line that says so. Raises ValueError if the folder holds
    another experiment's checkpoints. `flags_for` says which flags make so many pairs per step: what to change where
    that alone differs, as it does with the same flags on another number of processes.
    """
    for folder in sorted(_folders(output_dir), key=lambda folder: int(folder.name.split("-")[-1]), reverse=True):
        if (folder / COMPLETE).is_file():
            _refuse_another(folder, identity, flags_for)
            return folder
        logger.info("%s was interrupted while it was written: passed over", folder)
    return None


def is_finished(output_dir: str | Path, identity: Mapping[str, Any]) -> bool:
    """Whether this experiment has been trained to its end there. Raises ValueError if another one has."""
    if not (Path(output_dir) / COMPLETE).is_file():
        return False
    _refuse_another(Path(output_dir), identity)
    return True


def mark_complete(folder: Path, identity: Mapping[str, Any]) -> None:
    """The last file of a checkpoint, or of a finished training: all others are there."""
    share(folder)
    write_text(folder / COMPLETE, json.dumps(identity, indent=2))


def _refuse_another(folder: Path, identity: Mapping[str, Any], flags_for: Callable[[int], str] | None = None) -> None:
    theirs, ours = run_folder.read_object(folder / COMPLETE), dict(identity)
    size, own_size = theirs.get("pairs_per_step"), ours.get("pairs_per_step")
    if flags_for and size != own_size and not run_folder.differences(theirs, {**ours, "pairs_per_step": size}):
        raise ValueError(
            f"{folder} has {size} pairs per step, these flags make {own_size}: go on with {flags_for(size)}"
        )
    run_folder.refuse_another(folder, theirs, ours, "choose another --output_dir, or remove the old one")


def remove_interrupted(folder: Path) -> None:
    """Delete what a kill left of a checkpoint, before the same step is saved again, perhaps by other processes."""
    if folder.is_dir() and not (folder / COMPLETE).is_file():
        shutil.rmtree(folder)


def complete(folder: Path, identity: Mapping[str, Any], limit: int | None, best: str | None) -> None:
    """Make a checkpoint resumable, once every process has written its part, and delete what is older than `limit`.

    Only now: a kill at any moment leaves a complete checkpoint. `best` stays.
    """
    mark_complete(folder, identity)
    for other in _folders(folder.parent):
        remove_interrupted(other)  # else it could count as the newest, and be kept in place of this one
    rotate_checkpoints(str(folder.parent), limit, best, use_mtime=True)


def check_optim(optim: str) -> None:
    """Raises ValueError for optimisers whose state under DeepSpeed cannot be stored by parameter."""
    if "8bit" in optim or "4bit" in optim:
        raise ValueError(
            f"--optim {optim} has states per block of a process's partition, which no other number of processes could "
            "read: choose adamw_torch, or train without --deepspeed"
        )


def check_engine(engine) -> None:
    """Raises CheckpointError, before the first step, for a DeepSpeed optimiser that `save_state` does not know."""
    if _partitions(engine.optimizer) is None:
        raise CheckpointError("--deepspeed: checkpoints are of ZeRO stages 1 to 3; scripts/zero2.json is one")


def save_state(engine, folder: Path) -> None:
    """Write the fp32 parameters and optimiser states of a DeepSpeed engine; all processes call it together."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    folder.mkdir(parents=True, exist_ok=True)
    _link(engine.optimizer)
    partition = _partitions(engine.optimizer)[0]
    state = engine.optimizer.optimizer.state[partition]
    keys = [key for key, value in state.items() if torch.is_tensor(value) and value.shape == partition.shape]
    shard, size, count = {}, 0, 0
    for number, (name, parameter) in enumerate(_trained(engine)):
        for key in (MASTER, *keys):
            whole = _read(parameter, key)  # collective
            if number % world_size == rank:
                shard[f"{key}/{name}"] = whole.cpu().contiguous()
                size += whole.numel() * whole.element_size()
        if size > SHARD_BYTES:
            save_file(shard, folder / f"{rank:05}-{count:05}.safetensors")
            shard, size, count = {}, 0, count + 1
    if shard:
        save_file(shard, folder / f"{rank:05}-{count:05}.safetensors")
    if rank == 0:
        torch.save(_numbers(engine, state, keys, partition), folder / NUMBERS)


def load_state(engine, folder: Path) -> None:
    """Put what `save_state` wrote into an engine of any number of processes.

    Raises CheckpointError if something is missing.
    """
    if not (folder / NUMBERS).is_file():
        raise CheckpointError(f"{folder}: no state of the optimiser; was the checkpoint made with --save_only_model?")
    numbers = torch.load(folder / NUMBERS, weights_only=True)
    _create_states(engine.optimizer, numbers)
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    where = {key: file for file in files for key in file.keys()}
    for name, parameter in _trained(engine):
        for key in (MASTER, *numbers["states"]):
            if f"{key}/{name}" not in where:
                raise CheckpointError(f"{folder}: no {key} of {name}; remove it to go on from an older checkpoint")
            _write(parameter, key, where[f"{key}/{name}"].get_tensor(f"{key}/{name}"))
    for group, saved in zip(engine.optimizer.optimizer.param_groups, numbers["groups"], strict=True):
        group.update(saved)
    for name in COUNTERS:
        setattr(engine, name, numbers["engine"][name])
    vars(engine.optimizer.loss_scaler).update(numbers["loss_scaler"])
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(numbers["lr_scheduler"])


def _folders(output_dir: str | Path) -> list[Path]:
    return [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]


def _trained(engine) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _partitions(optimizer) -> list[Tensor] | None:
    """This process's flat fp32 partitions, which the wrapped optimiser has its states for; None: another class."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):  # ZeRO-3; ZeRO-1 and 2
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    return None


def _read(parameter, key: str) -> Tensor:
    """The whole fp32 value or state of a parameter, on every process."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return safe_get_full_fp32_param(parameter) if key == MASTER else safe_get_full_optimizer_state(parameter, key)


def _write(parameter, key: str, whole: Tensor) -> None:
    """Set this process's part of it, and the parameter in the training precision where it is the value."""
    import deepspeed
    from deepspeed import utils

    if key == MASTER:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.data.copy_(whole)
    if not hasattr(parameter, "ds_id"):  # ZeRO-1 and 2
        whole = whole.to(parameter.device)
        if key == MASTER:
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, key)
        return
    # ZeRO-3 pads the last partition, for which safe_set_full_fp32_param would read past the end.
    own, rank = parameter.ds_tensor.numel(), parameter._z3_optimizer._get_param_partition_rank(parameter)
    flat = F.pad(whole.flatten()[own * rank : own * (rank + 1)], (0, max(0, own * (rank + 1) - whole.numel())))[:own]
    if key == MASTER:
        utils.safe_set_local_fp32_param(parameter, flat)
    else:
        utils.safe_set_local_optimizer_state(parameter, flat, key)


def _numbers(engine, state: Mapping[str, Any], keys: list[str], partition: Tensor) -> dict[str, Any]:
    """What is not per parameter: step counts, hyperparameters of the groups, counters, the scale of the loss."""
    groups = engine.optimizer.optimizer.param_groups
    return {
        "states": keys,
        "scalars": {  # and whether they lie beside the partition
            name: (value.cpu(), value.device == partition.device) if torch.is_tensor(value) else (value, False)
            for name, value in state.items() if name not in keys
        },
        "groups": [{name: value for name, value in group.items() if name != "params"} for group in groups],
        "engine": {name: getattr(engine, name) for name in COUNTERS},
        "loss_scaler": {k: v for k, v in vars(engine.optimizer.loss_scaler).items() if isinstance(v, int | float)},
        "lr_scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
    }  # fmt: skip


def _create_states(optimizer, numbers: Mapping[str, Any]) -> None:
    """The optimiser's states as after a first step, which DeepSpeed leaves it to create them."""
    for partition in _partitions(optimizer):
        state = optimizer.optimizer.state[partition]
        for key in numbers["states"]:
            state[key] = torch.zeros_like(partition)
        for name, (value, is_beside) in numbers["scalars"].items():
            device = partition.device if is_beside else "cpu"
            state[name] = value.to(device, copy=True) if torch.is_tensor(value) else value
    _link(optimizer)


def _link(optimizer) -> None:
    """Let ZeRO-1 and 2 find the states of every parameter.

    They do so in their first step, but before the states of the second group of parameters exist.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
