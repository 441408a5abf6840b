"""Words that nobody said: repeated phrases, kinds of word errors, and output on noise and silence."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.manifest import write_manifest
from speechkd.files import atomic_write
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.metrics.normalizers import Normalizer, get_normalizer
from speechkd.metrics.wer import ErrorRates

NON_SPEECH_KINDS = ("silence", "white_noise", "pink_noise")
INT16_STEP = 1 / 32768


@dataclass(frozen=True)
class ErrorKindRates:
    """Word errors by kind, each over the reference words of the whole corpus; together they are the WER.

    Args:
        insertion_error_rate: IER in percent; a decoder that makes words up raises it.
        substitution_error_rate: SER in percent.
        deletion_error_rate: DER in percent.
    """

    insertion_error_rate: float
    substitution_error_rate: float
    deletion_error_rate: float


def error_kind_rates(rates: ErrorRates) -> ErrorKindRates:
    """IER, SER and DER of a corpus (Gandhi et al. 2023, https://arxiv.org/abs/2311.00430)."""
    return ErrorKindRates(
        insertion_error_rate=100 * rates.insertions / rates.num_reference_words,
        substitution_error_rate=100 * rates.substitutions / rates.num_reference_words,
        deletion_error_rate=100 * rates.deletions / rates.num_reference_words,
    )


def five_gram_duplicates(hypotheses: Sequence[str], normalizer: Normalizer) -> tuple[int, int]:
    """5-Dup: runs of five words that have occurred before, over all transcripts of a set read as one stream.

    Gandhi et al. 2023, https://arxiv.org/abs/2311.00430. Runs cross from one transcript into the next, and
    what speakers themselves repeat counts too. The count grows with the set: compare systems on equal sets only.

    Args:
        hypotheses: what was recognised, in the order of the set.
        normalizer: applied to each. "english" joins spelled digits to one number, which hides their loops.

    Returns:
        Number of runs beyond the first of their kind, and number of all runs.
    """
    normalize = get_normalizer(normalizer)
    words = [word for hypothesis in hypotheses for word in normalize(hypothesis).split()]
    num_runs = max(0, len(words) - 4)
    num_distinct = len(set(zip(*(words[start:] for start in range(5)), strict=False)))
    return num_runs - num_distinct, num_runs


def non_speech_clip(kind: str, index: int, seed: int = 0) -> np.ndarray:
    """A clip in which nobody speaks, 1 to 30 s; equal arguments give equal samples.

    Silence is digital zero in clip 0; in the others the last bit of 16-bit audio dithers. Noise is Gaussian, its power
    flat ("white_noise") or falling with frequency as 1/f ("pink_noise"), between -60 and -20 dB below full scale.

    Args:
        kind: one of `NON_SPEECH_KINDS`.
        index: number of the clip from 0.
        seed: of the whole collection.

    Returns:
        Samples at 16 kHz, (samples,), float64, -1 to 1.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in NON_SPEECH_KINDS:
        raise ValueError(f"unknown kind of non-speech {kind!r}; choose one of {', '.join(NON_SPEECH_KINDS)}")
    generator = np.random.default_rng([seed, NON_SPEECH_KINDS.index(kind), index])
    num_samples = int(generator.integers(10, 301)) * SAMPLE_RATE_HZ // 10
    if kind == "silence":
        return generator.integers(-1, 2, size=num_samples) * (INT16_STEP if index else 0.0)
    level_db = generator.uniform(-60, -20)
    noise = generator.standard_normal(num_samples)
    if kind == "pink_noise":
        spectrum = np.fft.rfft(noise)
        spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
        spectrum[0] = 0
        noise = np.fft.irfft(spectrum, num_samples)
    return np.clip(noise / np.sqrt(np.mean(noise**2)) * 10 ** (level_db / 20), -1, 1)


def write_non_speech(output_dir: str | Path, num_clips: int, seed: int = 0) -> Path:
    """Write clips of `non_speech_clip` as 16-bit FLAC, with a manifest of empty texts.

    Args:
        output_dir: gets `clips/` and `manifest.jsonl`.
        num_clips: clips of each kind.
        seed: of the collection.

    Returns:
        Path of the manifest; its ids begin with the kind.

    Raises:
        ValueError: `num_clips` is below 1.
    """
    if num_clips < 1:
        raise ValueError(f"the number of non-speech clips of each kind must be 1 or more, got {num_clips}")
    output_dir = Path(output_dir)
    utterances = []
    for kind in NON_SPEECH_KINDS:
        for index in range(num_clips):
            key = f"{kind}-seed{seed}-{index:04d}"
            samples = non_speech_clip(kind, index, seed)
            with atomic_write(output_dir / f"clips/{key}.flac") as temporary:
                soundfile.write(temporary, samples, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
            utterances.append(
                {
                    "id": key,
                    "audio": f"clips/{key}.flac",
                    "duration_seconds": len(samples) / SAMPLE_RATE_HZ,
                    "sample_rate_hz": SAMPLE_RATE_HZ,
                    "text": "",
                }
            )
    write_manifest(output_dir / "manifest.jsonl", utterances)
    return output_dir / "manifest.jsonl"


def non_speech_output(
    model_name: str,
    output_dir: str | Path,
    *,
    decoding: DecodingConfig,
    normalizer: Normalizer,
    num_clips: int = 20,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Let a model transcribe noise and silence and count the words it makes up.

    Args:
        model_name: Hub id, folder or `bundled:<name>`.
        output_dir: gets the clips and, in `decoded/`, what the model made of each; continued if it was begun.
        decoding: language and limits.
        normalizer: applied before words are counted.
        num_clips: clips of each kind.
        seed: of the clips.
        device: where the model runs; by default CUDA if there is one.

    Returns:
        `nonempty_rate` (percent of the clips with any word), `num_clips`, `num_nonempty`, `num_words`, and under each
        kind of `NON_SPEECH_KINDS` the same.

    Raises:
        ValueError: `num_clips` is below 1, or the folder holds transcripts of another model.
    """
    manifest = write_non_speech(output_dir, num_clips, seed)
    store = label_manifest(
        model_name,
        manifest,
        Path(output_dir) / "decoded",
        decoding=decoding,
        max_skipped_fraction=0.0,
        device=device,
    )
    normalize = get_normalizer(normalizer)
    num_words = {
        # the English normaliser leaves a lone "." of "...", which is no word
        row["id"]: sum(any(char.isalnum() for char in word) for word in normalize(row["text"]).split())
        for row in store.rows()
    }
    by_kind = {
        # by id: the folder may hold more clips, of an earlier and larger collection
        kind: _count_output([num_words[f"{kind}-seed{seed}-{index:04d}"] for index in range(num_clips)])
        for kind in NON_SPEECH_KINDS
    }
    totals = {
        key: sum(counts[key] for counts in by_kind.values()) for key in ("num_clips", "num_nonempty", "num_words")
    }
    return {"nonempty_rate": 100 * totals["num_nonempty"] / totals["num_clips"], **totals, **by_kind}


def _count_output(num_words: Sequence[int]) -> dict[str, Any]:
    num_nonempty = sum(words > 0 for words in num_words)
    return {
        "nonempty_rate": 100 * num_nonempty / len(num_words),
        "num_clips": len(num_words),
        "num_nonempty": num_nonempty,
        "num_words": sum(num_words),
    }
