"""The `checkpoint-<step>` folders of a run: which of them are complete, room for the next one, and their mean."""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from speechkd.files import atomic_write, full_disk_errno

logger = logging.getLogger(__name__)

COMPLETE = "complete.json"
_DELETING = ".deleting-"
# torch's zip writer keeps no errno, this is all it says when a write fails (2.14; the second one in older versions)
_TORCH_WRITE_FAILURES = ("unexpected pos", "PytorchStreamWriter failed writing", "iostream error")


def mark_incomplete(folder: str | Path) -> None:
    """Take the mark of completeness away, before a checkpoint of the same step is written over.

    Without this a kill in the middle could leave new weights and an old optimizer under a mark that fits both.
    """
    (Path(folder) / COMPLETE).unlink(missing_ok=True)


def mark_complete(folder: str | Path) -> None:
    """Declare a checkpoint complete: bring all of it to the disk, then write `complete.json`, atomically.

    Call it once, on the main process, when every process has written its files. After a crash or a power cut the mark
    is there only if everything before it is.

    Args:
        folder: a `checkpoint-<step>` folder.

    Raises:
        OSError: the disk is full, or does not take the data.
    """
    folder = Path(folder)
    # hidden names are what a writer left that was killed before it renamed them
    entries = sorted(path for path in folder.rglob("[!.]*") if path != folder / COMPLETE)
    for path in [*entries, folder]:
        _sync(path)
    sizes_bytes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in entries if path.is_file()}
    with atomic_write(folder / COMPLETE) as temporary:
        temporary.write_text(json.dumps({"sizes_bytes": sizes_bytes}, indent=2) + "\n", encoding="utf-8")
        _sync(temporary)
    _sync(folder)
    _sync(folder.parent)  # the checkpoint's own name


def last_complete_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest checkpoint that a run can continue from.

    Newer folders that are not complete are passed over, each with a warning. Files are compared by size, not read.

    Args:
        run_dir: run folder with `checkpoint-<step>` folders; need not exist.

    Returns:
        The folder of the highest step that is complete; None where there is none.
    """
    ignored: list[tuple[Path, str]] = []
    taken = None
    for folder in reversed(_checkpoints(run_dir).values()):
        problem = _problem(folder)
        if problem is None:
            taken = folder
            break
        ignored.append((folder, problem))
    instead = f"taking {taken} instead" if taken else f"{run_dir} has no complete checkpoint"
    for folder, problem in ignored:
        logger.warning("ignoring checkpoint %s: %s; %s", folder, problem, instead)
    return taken


def rotate(run_dir: str | Path, keep: int | None, protect: Path | None = None) -> None:
    """Delete the oldest checkpoints, and the incomplete ones that the newest complete one has overtaken.

    A folder is renamed before it is deleted, so a kill in between leaves nothing that looks like a checkpoint; the
    next call removes what is left. Call it on the main process only.

    Args:
        run_dir: run folder with `checkpoint-<step>` folders.
        keep: how many complete checkpoints remain, at least 1; None keeps all complete ones.
        protect: a checkpoint that is never deleted, such as the best one so far; it counts as one of `keep`.

    Raises:
        ValueError: keep is below 1.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"trainer.save_total_limit must be at least 1, got {keep}; null keeps all checkpoints")
    for leftover in Path(run_dir).glob(f"{_DELETING}checkpoint-*"):
        _remove(leftover)
    folders = list(_checkpoints(run_dir).values())
    complete = [folder for folder in folders if _problem(folder) is None]
    if not complete:
        return
    spared = {complete[-1].resolve()} | ({Path(protect).resolve()} if protect is not None else set())
    overtaken = [folder for folder in folders[: folders.index(complete[-1])] if folder not in complete]
    deletable = [folder for folder in complete if folder.resolve() not in spared]
    num_surplus = 0 if keep is None else max(0, len(complete) - keep)
    for folder in overtaken + deletable[:num_surplus]:
        if folder.resolve() in spared:
            continue
        hidden = folder.with_name(_DELETING + folder.name)
        folder.rename(hidden)
        _remove(hidden)
        logger.info("removed checkpoint %s", folder)


def checkpoint_bytes(model: nn.Module, optimizer_states_per_parameter: int = 2) -> int:
    """Estimate of what a checkpoint takes on the disk.

    Args:
        model: what is saved; tied parameters count once.
        optimizer_states_per_parameter: tensors of a parameter's size and dtype that the optimizer keeps for each
            trainable parameter; Adam has 2.

    Returns:
        Bytes of the parameters, the buffers and the optimizer's state.
    """
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    trainable = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return weights + optimizer_states_per_parameter * trainable


def require_space(folder: str | Path, needed_bytes: int) -> None:
    """Check that a checkpoint will fit, before anything of it is written.

    Args:
        folder: where it goes; need not exist yet.
        needed_bytes: its size, as `checkpoint_bytes` estimates it.

    Raises:
        OSError: ENOSPC, less than that is free; the message says how much is needed and free, and what to do.
    """
    if _free_bytes(folder) < needed_bytes:
        raise _full_disk_error(errno.ENOSPC, folder, needed_bytes)


def explain_full_disk(error: BaseException, folder: str | Path, needed_bytes: int) -> OSError | None:
    """The error to raise in place of one that came from a full disk.

    Recognised, also as the cause or context of another error: OSError with ENOSPC or EDQUOT, the text that safetensors
    and torch's old format keep of it, and a failed write of torch's zip writer. The last carries no reason, so it
    counts only while less than `needed_bytes` is free: call this before the half-written files are removed.

    Args:
        error: what saving raised.
        folder: where the checkpoint was going.
        needed_bytes: its size, as `checkpoint_bytes` estimates it.

    Returns:
        OSError with the message of `require_space`; None where the disk was not the reason.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        number = full_disk_errno(link)
        if number is None and _is_torch_write_failure(link) and _free_bytes(folder) < needed_bytes:
            number = errno.ENOSPC
        if number is not None:
            return _full_disk_error(number, folder, needed_bytes)
        link = link.__cause__ or link.__context__
    return None


def average_checkpoints(
    run_dir: str | Path, *, last: int | None = None, steps: Iterable[int] | None = None
) -> dict[str, Tensor]:
    """Mean of the weights of several checkpoints of one run, as icefall and ESPnet take it before decoding.

    Summed in float64 and cast back; holds the float64 sums and one tensor at a time. Integer and bool tensors come
    from the newest checkpoint.

    Args:
        run_dir: run folder with `checkpoint-<step>` folders, weights as `model.safetensors`, whole or in shards.
        last: average this many of the newest complete checkpoints.
        steps: average the checkpoints of these steps. Exactly one of `last` and `steps` is given.

    Returns:
        Name to tensor, shapes and dtypes as in the newest checkpoint, on the CPU. Tied weights appear once, as in the
        files: load with `strict=False`, then call `tie_weights()`.

    Raises:
        ValueError: not exactly one of `last` and `steps`, too few complete checkpoints, a step that is not there, or
            weights that differ in name or shape.
    """
    folders = _choose(run_dir, last, None if steps is None else sorted(set(steps)))
    newest = folders[-1]
    totals: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, tensor in _weights(newest):
        dtypes[name] = tensor.dtype
        totals[name] = tensor.double() if tensor.is_floating_point() else tensor
    for folder in folders[:-1]:
        missing = dict.fromkeys(totals)
        for name, tensor in _weights(folder):
            if name not in totals:
                raise _mismatch(f"{folder} has a tensor {name} that {newest} lacks")
            if tensor.shape != totals[name].shape:
                shapes = f"{tuple(tensor.shape)} in {folder} and {tuple(totals[name].shape)} in {newest}"
                raise _mismatch(f"tensor {name} has shape {shapes}")
            if dtypes[name].is_floating_point:
                totals[name] += tensor
            del missing[name]
        if missing:
            raise _mismatch(f"{newest} has a tensor {next(iter(missing))} that {folder} lacks")
    for name, dtype in dtypes.items():
        if dtype.is_floating_point:
            totals[name] = (totals[name] / len(folders)).to(dtype)  # in place of the sum, which is freed
    return totals


def _mismatch(what: str) -> ValueError:
    return ValueError(f"{what}; only checkpoints of one run with one architecture can be averaged, choose other steps")


def _checkpoints(run_dir: str | Path) -> dict[int, Path]:
    """Step to folder, complete or not, lowest step first."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        return {}
    found = {
        int(match[1]): path
        for path in run_dir.iterdir()
        if (match := re.fullmatch(r"checkpoint-([0-9]+)", path.name)) and path.is_dir()
    }
    return dict(sorted(found.items()))


def _problem(folder: Path) -> str | None:
    """Why a checkpoint is not complete; None if it is."""
    try:
        sizes_bytes = json.loads((folder / COMPLETE).read_bytes())["sizes_bytes"]
    except FileNotFoundError:
        return f"it has no {COMPLETE}, so it was half written when the run ended"
    except (ValueError, KeyError, TypeError):
        return f"its {COMPLETE} is damaged"
    for name, expected in sizes_bytes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected:
            return f"{name} has {path.stat().st_size} bytes instead of {expected}"
    return None


def _choose(run_dir: str | Path, last: int | None, steps: list[int] | None) -> list[Path]:
    """The checkpoints to average, lowest step first."""
    found = _checkpoints(run_dir)
    problems = {step: _problem(folder) for step, folder in found.items()}
    folders = {step: folder for step, folder in found.items() if problems[step] is None}
    existing = f"{run_dir} has complete checkpoints of the steps {', '.join(map(str, folders)) or '(none)'}"
    way_out = "choose among them, or raise trainer.save_total_limit before training so that more are kept"
    if last is not None and steps is None:
        if last < 1:
            raise ValueError(f"last must be at least 1, got {last}; it is the number of checkpoints to average")
        if last > len(folders):
            raise ValueError(f"cannot average the last {last} checkpoints: {existing}; {way_out}")
        return list(folders.values())[-last:]
    if steps is not None and last is None:
        lacking = [f"{step} ({problems.get(step, 'no such folder')})" for step in steps if step not in folders]
        if lacking or not steps:
            wanted = ", ".join(lacking[:10]) + (f" and {len(lacking) - 10} more" if len(lacking) > 10 else "")
            raise ValueError(f"cannot average the steps {wanted or '(none given)'}: {existing}; {way_out}")
        return [folders[step] for step in steps]
    raise ValueError(f"give exactly one of last and steps, got last={last} and steps={steps}")


def _weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a checkpoint, one at a time, on the CPU."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        files = [whole]
    elif index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        raise ValueError(
            f"{folder} has neither {whole.name} nor {index.name}, so there are no weights to average; under FSDP train "
            "with state_dict_type: FULL_STATE_DICT in trainer.fsdp_config"
        )
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def _sync(path: Path) -> None:
    """Wait until a file's data or a folder's names are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network and FUSE mounts cannot sync a folder, which is no reason to lose the checkpoint
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:  # a network file system may still hold a file; training goes on
        logger.warning("could not remove all of %s (%s); it is tried again at the next save", folder, error)


def _free_bytes(folder: str | Path) -> int:
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _full_disk_error(number: int, folder: str | Path, needed_bytes: int) -> OSError:
    return OSError(
        number,
        f"{os.strerror(number)}: a checkpoint needs about {needed_bytes / 1e6:,.1f} MB and "
        f"{_free_bytes(folder) / 1e6:,.1f} MB are free in {folder}; free some space or lower trainer.save_total_limit. "
        "The checkpoints before are kept, the same command resumes from the last of them",
    )


def _is_torch_write_failure(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(failure in str(error) for failure in _TORCH_WRITE_FAILURES)
