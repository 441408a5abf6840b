"""Every clip decoded once before training, so that a bad one is named then and not met in the middle of a run."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from speechkd.data.audio import AudioError, load_utterance
from speechkd.data.loader import (
    check_length,
    explain_dead_workers,
    ignore_sigterm_of_others,
    report_skipped,
    skipped_row,
)
from speechkd.data.manifest import Manifest
from speechkd.files import write_json

logger = logging.getLogger(__name__)

SAVE_EVERY_SECONDS = 30.0  # a run that is killed decodes this much again
CLIPS_PER_TASK = 16


def usable_clips(
    manifest: Manifest,
    output_dir: str | Path,
    *,
    max_seconds: float,
    max_skipped_fraction: float,
    num_workers: int,
) -> list[int]:
    """Positions of the utterances that can be decoded; the others are named in `skipped.jsonl`.

    The result is kept in `audio_check.json`. A resumed run reads it and decodes nothing, one that was killed goes on
    where it stood, and another manifest or `max_seconds` starts anew. Of several processes, the first one calls this
    before the others do.

    Args:
        manifest: the utterances.
        output_dir: folder of `skipped.jsonl` and `audio_check.json`.
        max_seconds: longer utterances are not usable.
        max_skipped_fraction: share of clips that may be unusable, 0 to 1.
        num_workers: decoding processes; 0 decodes in this one.

    Returns:
        Positions in the manifest, ascending.

    Raises:
        AudioError: too many are unusable.
    """
    path = Path(output_dir) / "audio_check.json"
    fingerprint = _fingerprint(manifest, max_seconds)
    num_checked, skipped = _read_check(path, fingerprint)
    if num_checked < len(manifest):
        saved_at = time.monotonic()
        for reasons in _checked(manifest, num_checked, max_seconds, num_workers):
            for reason in reasons:
                if reason is not None:
                    skipped.append({"position": num_checked, **skipped_row(manifest[num_checked], reason)})
                num_checked += 1
            if num_checked == len(manifest) or time.monotonic() - saved_at >= SAVE_EVERY_SECONDS:
                write_json(path, {"fingerprint": fingerprint, "num_checked": num_checked, "skipped": skipped})
                saved_at = time.monotonic()
    unusable = {row.pop("position") for row in skipped}
    try:
        report_skipped(skipped, len(manifest), output_dir, max_skipped_fraction)
    except AudioError as error:
        raise AudioError(f"{error}. Once the clips are repaired, delete {path} to have them decoded again") from error
    return [position for position in range(len(manifest)) if position not in unusable]


class _Reasons(Dataset):
    """Why a clip cannot be used, or None; the samples stay in the worker."""

    def __init__(self, manifest: Manifest, first: int, max_seconds: float) -> None:
        self.manifest, self.first, self.max_seconds = manifest, first, max_seconds

    def __len__(self) -> int:
        return len(self.manifest) - self.first

    def __getitem__(self, index: int) -> str | None:
        utterance = self.manifest[self.first + index]
        try:
            check_length(utterance, self.max_seconds)
            load_utterance(utterance, utterance["sample_rate_hz"], torch.int16)  # at its own rate: nothing to resample
        except AudioError as error:
            return str(error)
        return None


def _checked(manifest: Manifest, first: int, max_seconds: float, num_workers: int) -> Iterator[list[str | None]]:
    """Reasons of the clips from `first` on, in order, a few at a time."""
    hours = manifest.durations_seconds / 3600
    loader = DataLoader(
        _Reasons(manifest, first, max_seconds),
        batch_size=CLIPS_PER_TASK,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=ignore_sigterm_of_others,
        generator=torch.Generator(),  # without one, this pass draws from the global random state
    )
    with (
        explain_dead_workers(),
        tqdm(
            desc="checking audio",
            total=round(float(hours.sum()), 2),
            initial=float(hours[:first].sum()),
            unit="h",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} audio hours [{elapsed}<{remaining}]",
        ) as progress,
    ):
        for reasons in loader:
            yield reasons
            progress.update(float(hours[first : first + len(reasons)].sum()))
            first += len(reasons)


def _fingerprint(manifest: Manifest, max_seconds: float) -> str:
    digest = hashlib.sha256(json.dumps([str(manifest.path), max_seconds, manifest.ids]).encode())
    digest.update(manifest.durations_seconds.tobytes())
    for column in ("audio", "offset_seconds"):
        if column in manifest.rows.column_names and manifest.rows.features[column].dtype in ("string", "float64"):
            digest.update(json.dumps(manifest.rows[column][:]).encode())
    return digest.hexdigest()


def _read_check(path: Path, fingerprint: str) -> tuple[int, list[dict[str, Any]]]:
    """How many clips an earlier run has checked, and the unusable ones; (0, []) where it checked something else."""
    if not path.is_file():
        return 0, []
    check = json.loads(path.read_text(encoding="utf-8"))
    if check["fingerprint"] != fingerprint:
        logger.info("%s is of another manifest or limit; the clips are decoded again", path)
        return 0, []
    logger.info("%d clips were checked before, see %s", check["num_checked"], path)
    return check["num_checked"], check["skipped"]
