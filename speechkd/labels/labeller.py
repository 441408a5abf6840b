"""A teacher that turns batches of clips into rows of a label store."""

import logging
import time
from collections.abc import Collection
from typing import Any, Literal

import torch
from transformers import WhisperForConditionalGeneration

from speechkd.data.features import SAMPLE_RATE_HZ, WhisperLogMel
from speechkd.data.loader import ClipBatch
from speechkd.labels.decoder_state_labels import decoder_states_key, decoder_states_of_labels
from speechkd.labels.decoding import DecodingConfig, decoding_tokens
from speechkd.labels.filters import compression_ratio
from speechkd.labels.topk_labels import topk_of_labels
from speechkd.labels.topk_records import topk_key
from speechkd.models.whisper import encode, greedy_decode
from speechkd.teachers import load_processor

logger = logging.getLogger(__name__)

Target = Literal["text", "encoder_states", "topk", "decoder_states"]


class Labeller:
    """A teacher that makes rows of batches of clips.

    Args:
        model_name: Hub id, folder or `bundled:<name>`.
        model: the loaded teacher.
        decoding: language and limits.

    Raises:
        ValueError: see `decoding_tokens`.
    """

    def __init__(self, model_name: str, model: WhisperForConditionalGeneration, decoding: DecodingConfig) -> None:
        self.model, self.decoding = model, decoding
        self.tokenizer = load_processor(model_name).tokenizer
        self.tokens = decoding_tokens(model_name, model, self.tokenizer, decoding)
        self.log_mel = WhisperLogMel.for_model(model.config).to(model.device)
        self.num_clips = decoding.clips_per_batch(model.device)
        self._is_warm = False

    @property
    def window_seconds(self) -> float:
        """The longest clip that the teacher hears whole: 30 s, but for one whose window was shortened."""
        return self.log_mel.max_samples / SAMPLE_RATE_HZ

    def label(
        self, batch: ClipBatch, targets: Collection[str] = ("text",)
    ) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        """Rows, and arrays by id, of the decoded clips of one batch.

        What does not fit into the GPU's memory is labelled in parts of the next lower power of two, and so are later
        batches.

        Args:
            batch: decoded clips.
            targets: what the store keeps; with "encoder_states" each clip has an array, (frames, dim), float16, with
                "topk" one of records, under `topk_key` of its id, and with "decoder_states" one of (tokens, dim),
                float16, under `decoder_states_key`.

        Raises:
            ValueError: not even one clip fits, or what is to be stored is beyond float16.
        """
        rows: list[dict[str, Any]] = []
        arrays: dict[str, torch.Tensor] = {}
        while len(rows) < len(batch.utterances):
            part = slice(len(rows), len(rows) + self.num_clips)
            clips = ClipBatch(batch.utterances[part], batch.waveforms[part])
            labelled = self._try(clips, targets)
            if labelled is None:
                if len(clips.utterances) == 1:
                    raise ValueError(
                        f"clip {clips.utterances[0]['id']!r} does not even fit alone into the memory of "
                        f"{self.model.device}; end other programs on it, or take a smaller teacher"
                    )
                self.num_clips = 1 << (len(clips.utterances) - 1).bit_length() - 1  # the next lower power of two
                torch.cuda.empty_cache()
                logger.warning("out of GPU memory; going on with %d clips together", self.num_clips)
                continue
            rows += labelled[0]
            arrays |= labelled[1]
        return rows, arrays

    def _try(
        self, clips: ClipBatch, targets: Collection[str]
    ) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]] | None:
        """What `label` returns; None where memory does not suffice, and then nothing of the attempt is held."""
        try:
            if not self._is_warm:  # the first pass pays for loading and kernel selection; its time is not kept
                self._decode(ClipBatch(clips.utterances[:1], clips.waveforms[:1]))
                self._is_warm = True
            rows, states = self._decode(clips)
            arrays: dict[str, torch.Tensor] = {}
            labels = self.model, states, [row["token_ids"] for row in rows], self.tokens
            if "topk" in targets:
                arrays |= {
                    topk_key(row["id"]): record for row, record in zip(rows, topk_of_labels(*labels), strict=True)
                }
            if "decoder_states" in targets:
                decoded = decoder_states_of_labels(*labels)
                arrays |= {decoder_states_key(row["id"]): state for row, state in zip(rows, decoded, strict=True)}
        except torch.cuda.OutOfMemoryError:
            return None
        if "encoder_states" in targets:
            arrays |= {row["id"]: state for row, state in zip(rows, states.half().cpu(), strict=True)}
        return rows, arrays

    def _decode(self, clips: ClipBatch) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """Rows and encoder states, (batch, frames, dim); `compute_seconds` is shared evenly by the clips."""
        started = _synchronized_time(self.model.device)
        states = encode(self.model, self.log_mel(clips.waveforms))
        decoded = greedy_decode(
            self.model,
            states,
            self.tokens,
            max_new_tokens=self.decoding.max_new_tokens,
            timestamps=self.decoding.timestamps,
        )
        seconds = (_synchronized_time(self.model.device) - started) / len(decoded)
        rows = []
        for utterance, result in zip(clips.utterances, decoded, strict=True):
            text = self.tokenizer.decode(result.token_ids, skip_special_tokens=True).strip()
            rows.append(
                {
                    "id": utterance["id"],
                    "duration_seconds": utterance["duration_seconds"],
                    "text": text,
                    "token_ids": result.token_ids,
                    "mean_logprob": result.mean_logprob,
                    "compression_ratio": compression_ratio(text),
                    "no_speech_prob": result.no_speech_prob,
                    "finished": result.finished,
                    "compute_seconds": seconds,
                }
            )
            if "parts" in utterance:
                names = ("id", "start_seconds", "duration_seconds")
                parts = [{name: part[name] for name in names} for part in utterance["parts"]]
                rows[-1] |= {"previous_id": utterance["previous_id"], "parts": parts}
        return rows, states


def _synchronized_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
