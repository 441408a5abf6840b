"""Transcripts of recordings longer than Whisper's window of 30 s: in overlapping chunks, or window after window."""

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from speechkd.data.audio import AudioError, load_utterance
from speechkd.data.collate import WhisperTokens
from speechkd.data.features import SAMPLE_RATE_HZ, WINDOW_SAMPLES, WhisperLogMel
from speechkd.data.loader import skipped_row
from speechkd.data.manifest import Manifest
from speechkd.files import folder_lock
from speechkd.labels.decoding import DecodingConfig, decoding_tokens
from speechkd.labels.filters import compression_ratio
from speechkd.labels.pseudo_label import ShardWriter, pending_positions, store_header
from speechkd.labels.teacher_cache import LabelStore, create_store
from speechkd.models.greedy import greedy_tokens
from speechkd.models.whisper import encode
from speechkd.preemption import Preempted, sigterm_requests
from speechkd.teachers import load_processor, load_whisper

logger = logging.getLogger(__name__)

STRIDE_FRACTION = 6  # of a chunk, the part at each side that its neighbour hears as well
CHUNK_MAX_NEW_TOKENS = 128
TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
COMPRESSION_RATIO_THRESHOLD = 1.35  # zlib over token ids; OpenAI's 2.4 is over text
LOGPROB_THRESHOLD = -1.0
NO_SPEECH_THRESHOLD = 0.6


@dataclass(kw_only=True)
class LongFormConfig:
    """How recordings of any length are transcribed.

    Args:
        method: "chunked" decodes overlapping chunks in batches and joins them; "sequential" moves a window of 30 s by
            the predicted timestamps, one after the other, and needs a model that was trained with them.
        chunk_seconds: length of a chunk, best that of the training clips; of "sequential" it is not read.
        seed: of the sampling at temperatures above 0.
    """

    method: Literal["chunked", "sequential"] = "chunked"
    chunk_seconds: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("chunked", "sequential"):
            raise ValueError(f"long-form method {self.method!r} is unknown; choose chunked or sequential")
        if not 1 <= self.chunk_seconds <= WINDOW_SAMPLES / SAMPLE_RATE_HZ:
            raise ValueError(
                f"chunk_seconds={self.chunk_seconds:g} must be 1 to 30, Whisper's window; take the length of the clips "
                "that the model was trained on"
            )


@dataclass(frozen=True)
class LongTranscript:
    """A transcribed recording.

    Args:
        token_ids: of the text, without special tokens and timestamps.
        num_windows: chunks that were decoded; 0 where the method does not tell.
        num_unfinished: of these, chunks that were cut off at the limit of tokens.
    """

    token_ids: list[int]
    num_windows: int = 0
    num_unfinished: int = 0


def chunk_bounds(num_samples: int, chunk_samples: int) -> list[tuple[int, int]]:
    """First sample and end of each chunk; a sixth of a chunk at each side is shared with its neighbour.

    The last chunk ends with the recording and may be shorter.

    Args:
        num_samples: length of the recording, 1 or more.
        chunk_samples: length of a chunk.
    """
    step = chunk_samples - 2 * (chunk_samples // STRIDE_FRACTION)
    last_start = max(0, num_samples - chunk_samples)
    starts = range(0, last_start + step, step)  # up to the first chunk that reaches the end
    return [(start, min(start + chunk_samples, num_samples)) for start in starts]


def merge_chunks(chunks: Sequence[Sequence[int]]) -> list[int]:
    """Join the texts of overlapping chunks at the longest run of tokens that two neighbours share.

    Gandhi et al. 2023, https://arxiv.org/abs/2311.00430, section on chunked long-form transcription. Both texts are
    cut in the middle of the run, as the words at a chunk's border are the least certain. Of equally long runs the one
    with the smallest overlap counts. A single shared token is taken for chance, and then nothing is cut.

    Args:
        chunks: text tokens of each chunk, in order.

    Returns:
        Tokens of the whole text.
    """
    merged: list[int] = []
    num_last = 0  # tokens at the end that came from the chunk before, which alone can overlap
    for chunk in chunks:
        start = len(merged) - num_last
        left_end, right_start = _cut_points(merged[start:], chunk)
        merged[start + left_end :] = chunk[right_start:]
        num_last = len(chunk) - right_start
    return merged


def _cut_points(left: Sequence[int], right: Sequence[int]) -> tuple[int, int]:
    """How many tokens of the left text are kept, and where the right one sets in."""
    best, cut = (1, 0), (len(left), 0)
    lengths = [0] * (len(right) + 1)  # of the common run that ends at each token of the right text
    for i, token in enumerate(left, start=1):
        before = lengths
        lengths = [0] * (len(right) + 1)
        for j, other in enumerate(right, start=1):
            if token != other:
                continue
            lengths[j] = before[j - 1] + 1
            overlap = len(left) - i + j  # in tokens, if the texts are laid over each other at this run
            if lengths[j] > 1 and (lengths[j], -overlap) > best:
                best = (lengths[j], -overlap)
                half = lengths[j] // 2
                cut = (i - half, j - half)
    return cut


@torch.no_grad()
def transcribe_chunked(
    model: WhisperForConditionalGeneration,
    log_mel: WhisperLogMel,
    waveform: Tensor,
    tokens: WhisperTokens,
    *,
    chunk_seconds: float = 30.0,
    batch_size: int = 16,
    max_new_tokens: int = CHUNK_MAX_NEW_TOKENS,
) -> LongTranscript:
    """Greedy transcripts of overlapping chunks without timestamps, joined by `merge_chunks`.

    Only one batch of chunks is on the device at a time, whatever the length.

    Args:
        model: teacher or student.
        log_mel: features of the model, on its device.
        waveform: 16 kHz samples, (samples,), on any device.
        tokens: of the model's vocabulary; the prefix names language and task.
        chunk_seconds: length of a chunk, 1 to 30.
        batch_size: chunks decoded together.
        max_new_tokens: limit of tokens a chunk.
    """
    bounds = chunk_bounds(len(waveform), round(chunk_seconds * SAMPLE_RATE_HZ))
    chunks: list[list[int]] = []
    num_unfinished = 0
    starts = range(0, len(bounds), batch_size)
    for first in tqdm(starts, desc="chunks", unit="batch", leave=False, disable=len(starts) == 1):
        clips = [waveform[start:end] for start, end in bounds[first : first + batch_size]]
        padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True).to(model.device)
        states = encode(model, log_mel(padded))
        for result in greedy_tokens(model, states, tokens, max_new_tokens=max_new_tokens):
            num_unfinished += result.token_ids[-1] != tokens.end_of_text
            chunks.append(text_ids(result.token_ids, tokens))
    return LongTranscript(merge_chunks(chunks), len(chunks), num_unfinished)


@torch.no_grad()
def transcribe_sequential(
    model: WhisperForConditionalGeneration,
    feature_extractor: WhisperFeatureExtractor,
    waveform: Tensor,
    tokens: WhisperTokens,
    *,
    language: str | None,
    task: str = "transcribe",
    max_new_tokens: int = 224,
    seed: int = 0,
) -> LongTranscript:
    """A window of 30 s moved by the timestamps that the model predicts, by transformers' own `generate`.

    Radford et al. 2022, https://arxiv.org/abs/2212.04356, section 4.5, with the thresholds that Distil-Whisper uses. A
    window whose text repeats itself or is improbable is decoded again, sampled at a rising temperature; a window that
    is improbable and likely without speech is left out. Earlier text is no prompt. The features of the whole recording
    are held, about 1.2 GB at the peak for an hour.

    Args:
        model: teacher or student.
        feature_extractor: of the model's processor.
        waveform: 16 kHz samples, (samples,).
        tokens: of the model's vocabulary.
        language: language code; None for English-only models.
        task: transcribe or translate.
        max_new_tokens: limit of tokens a window.
        seed: of the sampling; the global random state is left as it was.
    """
    features = feature_extractor(
        waveform.cpu().numpy(),
        sampling_rate=SAMPLE_RATE_HZ,
        return_tensors="pt",
        truncation=False,
        padding="longest",
        return_attention_mask=True,
    )
    forced: dict[str, Any] = {} if language is None else {"language": language, "task": task}
    num_frames = features.input_features.shape[-1]
    devices = [model.device] if model.device.type == "cuda" else []
    bar = tqdm(total=num_frames, desc="frames", leave=False, disable=len(waveform) <= WINDOW_SAMPLES)

    def show(progress: Tensor) -> None:
        bar.update(int(progress[0, 0]) - bar.n)

    generate: Any = model.generate
    with bar, torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        sequences = generate(
            features.input_features.to(model.device, model.dtype),
            attention_mask=features.attention_mask.to(model.device),
            return_timestamps=True,
            temperature=TEMPERATURES,
            compression_ratio_threshold=COMPRESSION_RATIO_THRESHOLD,
            logprob_threshold=LOGPROB_THRESHOLD,
            no_speech_threshold=NO_SPEECH_THRESHOLD,
            condition_on_prev_tokens=False,
            max_new_tokens=max_new_tokens,
            num_beams=1,
            return_dict_in_generate=False,
            monitor_progress=show,
            **forced,
        )
    return LongTranscript(text_ids(sequences[0].tolist(), tokens))


def text_ids(token_ids: Sequence[int], tokens: WhisperTokens) -> list[int]:
    """The tokens of the text alone, without special ones and timestamps."""
    return [token for token in token_ids if token < tokens.first_special]


def transcribe_long_manifest(
    model_name: str,
    manifest: Manifest,
    output_dir: Path,
    *,
    decoding: DecodingConfig,
    long_form: LongFormConfig,
    max_skipped_fraction: float = 0.01,
    device: torch.device | str | None = None,
) -> LabelStore:
    """Transcribe clips of any length, each decoded from its file once, carrying on where an earlier call stopped.

    A row holds `id, duration_seconds, text, token_ids, compression_ratio, num_windows, num_unfinished,
    compute_seconds`; `token_ids` are those of the text alone.

    Args:
        model_name: Hub id, folder or `bundled:<name>`.
        manifest: the clips.
        output_dir: label store; created or continued.
        decoding: language and limits; `batch_size` counts chunks.
        long_form: how.
        max_skipped_fraction: share of clips that may be undecodable, 0 to 1.
        device: where the model runs; by default CUDA if there is one.

    Raises:
        LabelStoreError, AudioError: see their modules.
        ValueError: a language that the model does not know.
        Preempted: SIGTERM came; the clips before it are stored.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model, processor = load_whisper(model_name, device=device), load_processor(model_name)
    tokens = decoding_tokens(model_name, model, processor.tokenizer, decoding)
    log_mel = WhisperLogMel.for_model(model.config).to(device)
    chunked = partial(
        transcribe_chunked,
        model,
        log_mel,
        tokens=tokens,
        chunk_seconds=long_form.chunk_seconds,
        batch_size=decoding.clips_per_batch(device),
        max_new_tokens=min(decoding.max_new_tokens, CHUNK_MAX_NEW_TOKENS),
    )
    sequential = partial(
        transcribe_sequential,
        model,
        processor.feature_extractor,
        tokens=tokens,
        language=decoding.language,
        task=decoding.task,
        max_new_tokens=decoding.max_new_tokens,
        seed=long_form.seed,
    )
    transcribe = chunked if long_form.method == "chunked" else sequential
    header = store_header(model_name, model, ("text",), decoding)
    header["decoding"]["long_form"] = asdict(long_form)
    with folder_lock(output_dir):
        store = create_store(output_dir, header)
        pending = pending_positions(manifest, store)
        if not pending:
            return store
        transcribe(torch.zeros(SAMPLE_RATE_HZ))  # the first pass pays for kernel selection; its time is not kept
        with sigterm_requests() as termination, ShardWriter(store, manifest, pending, max_skipped_fraction) as writer:
            for index in pending:
                utterance = manifest[index]
                try:
                    waveform = load_utterance(utterance, SAMPLE_RATE_HZ)
                except AudioError as error:
                    writer.add([], {}, [skipped_row(utterance, str(error))])
                    continue
                started = time.perf_counter()
                result = transcribe(waveform)  # its tokens come to the CPU, so all of it has run
                seconds = time.perf_counter() - started
                if result.num_unfinished:
                    logger.warning(
                        "%s: %d of %d chunks were cut off at the limit of tokens; take a smaller --chunk-seconds",
                        utterance["id"],
                        result.num_unfinished,
                        result.num_windows,
                    )
                text = processor.tokenizer.decode(result.token_ids, skip_special_tokens=True).strip()
                row = {name: utterance[name] for name in ("id", "duration_seconds")} | {
                    "text": text,
                    **asdict(result),
                    "compression_ratio": compression_ratio(text),
                    "compute_seconds": seconds,
                }
                writer.add([row], {}, [], write_now=termination.received)
                if termination.received:
                    raise Preempted(f"stopped by SIGTERM; what is done is in {store.folder}, the same command resumes")
    return store
