"""Transcripts of a `RecognizerModel`: greedy, or by torchaudio's beam searches.

recognizer = Recognizer.from_pretrained("exp/mvq/fsdd/student")
texts = recognizer.transcribe(waveforms, num_samples)
store = transcribe_manifest("exp/mvq/fsdd/student", manifest, "exp/mvq/fsdd/decoded", RecognitionConfig())
"""

import time
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from speechkd.data.features import KALDI_FRAME_SAMPLES, SAMPLE_RATE_HZ
from speechkd.data.loader import clip_batches
from speechkd.data.manifest import Manifest
from speechkd.files import folder_lock
from speechkd.labels.pseudo_label import ShardWriter, pending_positions
from speechkd.labels.teacher_cache import LabelStore, create_store
from speechkd.models.ctc_head import BLANK, ctc_greedy
from speechkd.models.recognizer import RecognizerInputs, RecognizerModel
from speechkd.models.recognizer_tokens import Tokens
from speechkd.preemption import Preempted, sigterm_requests
from speechkd.teachers import teacher_identity

MAX_SYMBOLS_PER_FRAME = 10  # a transducer that is not trained would speak for ever
MAX_CLIP_SECONDS = 3600.0


@dataclass(kw_only=True)
class RecognitionConfig:
    """How a recogniser is decoded.

    Args:
        method: greedy takes the likeliest symbol of each frame, beam keeps several strings. That of CTC needs
            flashlight-text.
        beam_size: strings that are kept.
        batch_size: clips encoded together.
        num_workers: processes that decode audio files; 0 decodes in the main process.
    """

    method: Literal["greedy", "beam"] = "greedy"
    beam_size: int = 4
    batch_size: int = 8
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.beam_size < 1 or self.batch_size < 1:
            raise ValueError(f"beam_size and batch_size must be 1 or more, got {self.beam_size} and {self.batch_size}")


class Recognizer:
    """A recogniser with its input and its symbols.

    Args:
        model: in eval mode.
        tokens: its symbols.

    Raises:
        ValueError: the numbers of symbols differ.
    """

    def __init__(self, model: RecognizerModel, tokens: Tokens) -> None:
        if model.config.num_symbols != len(tokens):
            raise ValueError(f"the model has {model.config.num_symbols} symbols and the tokens {len(tokens)}")
        self.model, self.tokens = model.eval(), tokens
        self.inputs = RecognizerInputs(model.config.num_mels).to(model.device)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> "Recognizer":
        """A student of recipes/mvq.

        Raises:
            ValueError: the folder holds no tokens.
            OSError: it holds no model.
        """
        tokens = Tokens.load(folder)
        model: Any = RecognizerModel.from_pretrained(folder)
        return cls(model.to(device), tokens)

    @torch.no_grad()
    def transcribe(self, waveforms: Tensor, num_samples: Tensor, config: RecognitionConfig | None = None) -> list[str]:
        """Texts of clips.

        Args:
            waveforms: 16 kHz samples in [-1, 1], padded to a common length, (batch, samples).
            num_samples: length of each, (batch,), int64.
            config: greedy, if not given.

        Raises:
            ValueError: a clip is below 25 ms, or flashlight-text is missing.
        """
        config = config or RecognitionConfig()
        states, num_frames = self.model(*self.inputs(waveforms.to(self.model.device), num_samples))
        last = states[-1]
        is_ctc = self.model.config.head == "ctc"
        if config.method == "greedy":
            numbers = self._greedy_ctc(last, num_frames) if is_ctc else self._greedy_transducer(last, num_frames)
        else:
            search = self._beam_ctc if is_ctc else self._beam_transducer
            numbers = search(last, num_frames, config.beam_size)
        return [self.tokens.decode(clip) for clip in numbers]

    def _greedy_ctc(self, states: Tensor, num_frames: Tensor) -> list[list[int]]:
        symbols = [str(number) for number in range(1, len(self.tokens) + 1)]
        found = ctc_greedy(self.model.ctc_logits(states), num_frames, symbols)
        return [[int(symbol) for symbol in clip] for clip in found]

    def _greedy_transducer(self, states: Tensor, num_frames: Tensor) -> list[list[int]]:
        """Clip by clip; the predictor has seen no more than two symbols, so a step is small."""
        model, blank = self.model, self.model.config.num_symbols
        one = torch.ones(1, dtype=torch.int64)
        found = []
        for clip, length in zip(model.source(states), num_frames.tolist(), strict=True):
            numbers: list[int] = []
            said, _, state = model.predictor(torch.tensor([[blank]], device=states.device), one, None)
            for frame in clip[:length]:
                for _ in range(MAX_SYMBOLS_PER_FRAME):
                    best = int(model.joiner(frame[None, None], one, said, one)[0].argmax())
                    if best == blank:
                        break
                    numbers.append(best + 1)
                    said, _, state = model.predictor(torch.tensor([[best]], device=states.device), one, state)
            found.append(numbers)
        return found

    def _beam_ctc(self, states: Tensor, num_frames: Tensor, beam_size: int) -> list[list[int]]:
        scores = F.log_softmax(self.model.ctc_logits(states).float(), dim=-1).cpu().contiguous()
        best = self._ctc_decoder(beam_size)(scores, num_frames)
        return [clip[0].tokens.tolist() if clip else [] for clip in best]

    def _ctc_decoder(self, beam_size: int) -> Any:
        try:
            from torchaudio.models.decoder import ctc_decoder

            names = [str(number) for number in range(len(self.tokens) + 1)]
            return ctc_decoder(
                lexicon=None,
                tokens=names,
                beam_size=beam_size,
                log_add=True,  # alignments of one string add up
                blank_token=names[BLANK],
                sil_token=names[BLANK],  # there is no other silence
            )
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"beam search of CTC needs flashlight-text ({error}); install speechkd[beam], or decode greedily"
            ) from error

    @cached_property
    def _transducer_search(self) -> Any:
        model = torchaudio.models.RNNT(_Encoded(), self.model.predictor, self.model.joiner)
        return torchaudio.models.RNNTBeamSearch(
            model, self.model.config.num_symbols, step_max_tokens=MAX_SYMBOLS_PER_FRAME
        )

    def _beam_transducer(self, states: Tensor, num_frames: Tensor, beam_size: int) -> list[list[int]]:
        beam_size = min(beam_size, self.model.config.num_symbols)  # of the first step there are no more
        found = []
        for clip, length in zip(self.model.source(states), num_frames, strict=True):
            best = self._transducer_search(clip[:length], length, beam_size)[0]
            found.append([symbol + 1 for symbol in best[0][1:]])  # the blank stands first
        return found


class _Encoded(nn.Module):
    """Stands for the encoder in torchaudio's search: its input is encoded already."""

    def forward(self, input: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return input, lengths


def transcribe_manifest(
    folder: str | Path,
    manifest: Manifest,
    output_dir: str | Path,
    config: RecognitionConfig,
    *,
    max_skipped_fraction: float = 0.01,
    device: torch.device | str | None = None,
) -> LabelStore:
    """Transcribe a manifest into a label store, carrying on where an earlier call stopped.

    Rows hold `id, duration_seconds, text, compute_seconds`. Clips below 25 ms say nothing.

    Args:
        folder: of the recogniser.
        manifest: the utterances.
        output_dir: label store; created or continued.
        config: how it is decoded.
        max_skipped_fraction: share of clips that may be undecodable, 0 to 1.
        device: where it runs; by default CUDA if there is one.

    Raises:
        LabelStoreError, AudioError: see their modules.
        ValueError: see `Recognizer.from_pretrained`.
        Preempted: SIGTERM came; the batches before it are stored.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    recognizer = Recognizer.from_pretrained(folder, device)
    chosen = {name: asdict(config)[name] for name in ("method", "beam_size")}
    header = {
        "teacher": teacher_identity(str(folder), recognizer.model),
        "targets": ["text"],
        "decoding": chosen if config.method == "beam" else {"method": "greedy"},
    }
    with folder_lock(Path(output_dir)):
        store = create_store(output_dir, header)
        pending = pending_positions(manifest, store)
        if not pending:
            return store
        batches = clip_batches(
            manifest,
            pending,
            sample_rate_hz=SAMPLE_RATE_HZ,
            batch_size=1,  # so that nothing is padded and lengths are known
            max_seconds=MAX_CLIP_SECONDS,
            num_workers=config.num_workers,
        )
        with sigterm_requests() as termination, ShardWriter(store, manifest, pending, max_skipped_fraction) as writer:
            clips: list[tuple[dict[str, Any], Tensor]] = []
            for number, batch in enumerate(batches, start=1):
                clips += zip(batch.utterances, batch.waveforms, strict=True)
                is_due = len(clips) >= config.batch_size or number == len(pending) or termination.received
                rows = _rows(recognizer, clips, config) if is_due else []
                if is_due:
                    clips = []
                writer.add(rows, {}, batch.skipped, write_now=termination.received)
                if termination.received:
                    raise Preempted(f"stopped by SIGTERM; what is done is in {store.folder}, the same command resumes")
    return store


def _rows(
    recognizer: Recognizer, clips: list[tuple[dict[str, Any], Tensor]], config: RecognitionConfig
) -> list[dict[str, Any]]:
    started = time.perf_counter()
    heard = [clip for clip in clips if len(clip[1]) >= KALDI_FRAME_SAMPLES]
    texts: dict[str, str] = {}
    if heard:
        waveforms = pad_sequence([waveform for _, waveform in heard], batch_first=True)
        num_samples = torch.tensor([len(waveform) for _, waveform in heard])
        said = recognizer.transcribe(waveforms, num_samples, config)
        texts = {utterance["id"]: text for (utterance, _), text in zip(heard, said, strict=True)}
    seconds = (time.perf_counter() - started) / max(1, len(clips))
    return [
        {
            "id": utterance["id"],
            "duration_seconds": utterance["duration_seconds"],
            "text": texts.get(utterance["id"], ""),
            "compute_seconds": seconds,
        }
        for utterance, _ in clips
    ]
