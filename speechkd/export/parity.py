"""Whether an export says the same as the model that it was made of, on real clips."""

import logging
from pathlib import Path
from typing import Any

from tqdm import tqdm

from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.hub import read_utterances
from speechkd.data.loader import clip_batches
from speechkd.export.transcribers import Transcriber
from speechkd.metrics.wer import error_rates

logger = logging.getLogger(__name__)


def check_parity(
    source: Transcriber, exported: Transcriber, manifest_path: str | Path, *, max_clips: int | None = None
) -> dict[str, Any]:
    """Transcribe clips with both and compare the texts.

    Args:
        source: of the model in float32 PyTorch.
        exported: of the export.
        manifest_path: the clips; those that cannot be decoded are named in the log and left out.
        max_clips: only the first so many.

    Returns:
        As `compare_texts`, with `manifest` and `num_skipped`.

    Raises:
        ValueError: no clip could be decoded, or `max_clips` is below 1.
    """
    if max_clips is not None and max_clips < 1:
        raise ValueError(f"max_clips must be 1 or more, got {max_clips}")
    manifest = read_utterances(manifest_path)
    if max_clips is not None:
        manifest = manifest.select(range(min(max_clips, len(manifest))))
    ids, source_texts, export_texts = [], [], []
    batches = clip_batches(manifest, range(len(manifest)), sample_rate_hz=SAMPLE_RATE_HZ, batch_size=1, device="cpu")
    num_skipped = 0
    for batch in tqdm(batches, total=len(manifest), desc="parity", unit="clip"):
        for skipped in batch.skipped:
            logger.warning("%s", skipped["reason"])
        num_skipped += len(batch.skipped)
        for utterance, clip in zip(batch.utterances, batch.waveforms, strict=True):
            ids.append(utterance["id"])
            source_texts.append(source(clip.numpy()))
            export_texts.append(exported(clip.numpy()))
    if not ids:
        raise ValueError(f"none of the {len(manifest)} clips of {manifest_path} could be decoded; see the log")
    return compare_texts(ids, source_texts, export_texts) | {
        "manifest": str(manifest_path),
        "num_skipped": num_skipped,
    }


def check_clips_fit(manifest_path: str | Path, window_seconds: float, max_clips: int | None = None) -> None:
    """Refuse clips that are longer than what an export takes.

    Raises:
        ValueError: names how many are, and the longest.
    """
    seconds = read_utterances(manifest_path).durations_seconds[:max_clips]
    num_long = int((seconds > window_seconds).sum())
    if num_long:
        raise ValueError(
            f"{num_long} of {len(seconds)} clips of {manifest_path} are longer than the export's window of "
            f"{window_seconds:g} s, the longest has {seconds.max():.2f} s; choose a longer window, or clips that fit"
        )


def compare_texts(ids: list[str], source_texts: list[str], export_texts: list[str]) -> dict[str, Any]:
    """How many texts are equal to the letter, and which are not.

    Args:
        ids: of the utterances.
        source_texts: of the model in float32 PyTorch.
        export_texts: of the export.

    Returns:
        `num_clips`, `num_equal`, `wer` of the export against the source in percent, case and punctuation included
        (None where the source says nothing), and `differing`, a list of `id`, `source` and `export`.
    """
    differing = [
        {"id": utterance_id, "source": source, "export": export}
        for utterance_id, source, export in zip(ids, source_texts, export_texts, strict=True)
        if source != export
    ]
    has_words = any(text.split() for text in source_texts)
    return {
        "num_clips": len(ids),
        "num_equal": len(ids) - len(differing),
        "wer": error_rates(source_texts, export_texts, "none").wer if has_words else None,
        "differing": differing,
    }


def log_parity(parity: dict[str, Any]) -> None:
    """Show what differs, utterance by utterance."""
    for pair in parity["differing"]:
        logger.warning("%s differs\n  source: %s\n  export: %s", pair["id"], pair["source"], pair["export"])
    wer = "no words to compare" if parity["wer"] is None else f"WER between them {parity['wer']:.2f} %"
    logger.info("parity: %d of %d transcripts equal, %s", parity["num_equal"], parity["num_clips"], wer)
