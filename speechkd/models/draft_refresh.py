"""A draft model that learns from its rejected tokens while its teacher transcribes, so that more of them are accepted.

Online Speculative Decoding, Liu et al. 2023, https://arxiv.org/abs/2310.07177. The text stays the teacher's throughout.
"""

import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from speechkd.data.collate import WhisperTokens
from speechkd.data.features import SAMPLE_RATE_HZ, WhisperLogMel
from speechkd.data.hub import read_utterances
from speechkd.data.loader import clip_batches
from speechkd.export.huggingface import save_student
from speechkd.files import folder_lock, read_jsonl, write_jsonl
from speechkd.labels.decoding import DecodingConfig, decoding_tokens
from speechkd.losses.sparse import TopK, topk_divergence, topk_targets
from speechkd.models.speculative import Speculated, assistant_from_student, load_assistant, speculative_decode
from speechkd.models.whisper import freeze_student
from speechkd.preemption import Preempted, sigterm_requests
from speechkd.teachers import load_processor, load_whisper

MAX_GRAD_NORM = 1.0
SAVE_SECONDS = 60.0  # a kill loses at most this much work


@dataclass(kw_only=True)
class RefreshConfig:
    """When and how the draft learns.

    Args:
        refresh_every: clips between two refreshes; 0 never refreshes.
        num_steps: optimizer steps of a refresh.
        batch_size: clips of a step, drawn from the buffer.
        buffer_clips: latest clips with a rejection that are held, with their encoder states in half precision (1.5 MB a
            clip for whisper-base, 3.8 MB for large).
        learning_rate: of AdamW, constant.
        divergence: the loss of that name in `speechkd.losses.sparse`.
        top_k: ids of the teacher's distribution that are kept of each rejection.
        seed: of the batches.
    """

    refresh_every: int = 16
    num_steps: int = 4
    batch_size: int = 8
    buffer_clips: int = 64
    learning_rate: float = 1e-4
    divergence: Literal["forward_kl", "reverse_kl", "generalized_jsd", "total_variation"] = "forward_kl"
    top_k: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {
            name: getattr(self, name) for name in ("num_steps", "batch_size", "buffer_clips", "top_k", "learning_rate")
        }
        if wrong := {name: value for name, value in counts.items() if value <= 0}:
            raise ValueError(f"a refresh needs positive settings, got {wrong}; refresh_every=0 turns it off")
        if self.refresh_every < 0:
            raise ValueError(f"refresh_every must be 0 (never) or more, got {self.refresh_every}")


@dataclass(frozen=True)
class _Lesson:
    """A decoded clip, the positions where the teacher chose otherwise, and its distribution there."""

    encoder_states: Tensor  # (frames, dim), float16 or bfloat16
    token_ids: list[int]
    positions: list[int]
    targets: TopK  # (positions, k)


class RefreshedDraft:
    """Speculative decoding whose assistant is trained on what the teacher rejects.

    Args:
        teacher: decides every token.
        assistant_name: Hub id or folder of the student, as in `load_assistant`.
        tokens: of both vocabularies; the prefix names language and task.
        config: when and how the draft learns.
        max_new_tokens: limit of decoded tokens a clip, end token included.

    Raises:
        ValueError: see `load_assistant`.
    """

    def __init__(
        self,
        teacher: WhisperForConditionalGeneration,
        assistant_name: str,
        tokens: WhisperTokens,
        config: RefreshConfig,
        *,
        max_new_tokens: int = 224,
    ) -> None:
        self.teacher, self.tokens, self.config, self.max_new_tokens = teacher, tokens, config, max_new_tokens
        self.assistant = load_assistant(assistant_name, teacher)
        self.student = load_whisper(assistant_name, dtype=torch.float32, device=teacher.device)
        if teacher.dtype == torch.float32:
            self.student.model.encoder = teacher.model.encoder  # equal, as load_assistant has found: held once
        freeze_student(self.student)
        trained = [weight for weight in self.student.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, weight_decay=0.0)
        self.lessons: deque[_Lesson] = deque(maxlen=config.buffer_clips)
        self.random = random.Random(config.seed)
        self.num_clips = self.num_refreshes = 0

    def decode(self, encoder_states: Tensor, duration_seconds: float = 30.0) -> Speculated:
        """Transcribe one clip as `speculative_decode` does; after every `refresh_every` clips the draft learns.

        Args:
            encoder_states: the teacher's, (1, frames, dim).
            duration_seconds: of the clip.
        """
        rejected: list[tuple[int, Tensor]] = []
        result = speculative_decode(
            self.teacher,
            self.assistant,
            encoder_states,
            self.tokens,
            max_new_tokens=self.max_new_tokens,
            duration_seconds=duration_seconds,
            on_rejection=lambda position, logits: rejected.append((position, logits)),
        )
        if rejected:
            positions, logits = zip(*rejected, strict=True)
            # float16 holds a Whisper's states to three digits; bfloat16 would hold two
            states = encoder_states[0].half() if encoder_states.dtype == torch.float32 else encoder_states[0]
            targets = topk_targets(torch.stack(logits), self.config.top_k)
            self.lessons.append(_Lesson(states.clone(), result.token_ids, list(positions), targets))
        self.num_clips += 1
        if self.config.refresh_every and self.num_clips % self.config.refresh_every == 0:
            self.refresh()
        return result

    def refresh(self) -> list[float]:
        """Train the float student on the buffer and put its weights into the assistant.

        Returns:
            The loss of each step, before it; empty where nothing was rejected yet.
        """
        if not self.lessons:
            return []
        losses = [self._step() for _ in range(self.config.num_steps)]
        self.assistant = assistant_from_student(self.student, self.teacher)
        self.num_refreshes += 1
        return losses

    def _step(self) -> float:
        lessons = self.random.sample(list(self.lessons), min(self.config.batch_size, len(self.lessons)))
        longest = max(len(lesson.token_ids) for lesson in lessons)
        device = self.student.device
        # what pads a shorter text stands behind it, where no scored position sees it
        padded = [
            [*lesson.token_ids, *[self.tokens.end_of_text] * (longest - len(lesson.token_ids))] for lesson in lessons
        ]
        with torch.enable_grad():
            hidden = self.student.model.decoder(
                input_ids=torch.tensor(padded, device=device),
                encoder_hidden_states=torch.stack([lesson.encoder_states for lesson in lessons]).float(),
                use_cache=False,
            ).last_hidden_state
            # the state before a token predicts it
            scored = [hidden[row, [at - 1 for at in lesson.positions]] for row, lesson in enumerate(lessons)]
            logits = self.student.proj_out(torch.cat(scored))
            targets = TopK(*(torch.cat(parts) for parts in zip(*(lesson.targets for lesson in lessons), strict=True)))
            loss = topk_divergence(logits, targets, divergence=self.config.divergence)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        clip_grad_norm_(weights, MAX_GRAD_NORM)
        self.optimizer.step()
        return loss.item()

    def save(self, output_dir: str | Path, processor: WhisperProcessor) -> None:
        """Write the refreshed student as a stock Hugging Face folder: new decoder, the same encoder.

        Args:
            output_dir: complete or absent; an earlier one is replaced.
            processor: of the teacher, saved beside the weights.
        """
        card = (
            "# Draft of a speculative decoder\n\nA Whisper student whose decoder was refreshed "
            f"{self.num_refreshes} times on {self.num_clips} clips, from the tokens that its teacher rejected "
            "(Online Speculative Decoding, https://arxiv.org/abs/2310.07177).\n"
        )
        save_student(self.student, processor, output_dir, card)


def refresh_on_manifest(
    teacher_name: str,
    assistant_name: str,
    manifest_path: str | Path,
    output_dir: str | Path,
    *,
    config: RefreshConfig,
    language: str | None = "en",
    max_new_tokens: int = 224,
    device: torch.device | str | None = None,
) -> list[dict[str, Any]]:
    """Transcribe a manifest in its order while the draft learns; carries on where an earlier call stopped.

    A resumed run has the weights and transcripts of its last save, but an empty buffer and new optimizer moments.

    Args:
        teacher_name: Hub id, folder or `bundled:<name>`.
        assistant_name: student of this teacher; Hub id or folder.
        manifest_path: clips of up to 30 s.
        output_dir: gets `student/`, `transcripts.jsonl` and `skipped.jsonl`.
        config: when and how the draft learns.
        language: language code; None for English-only models.
        max_new_tokens: limit of decoded tokens a clip.
        device: where the models run; by default CUDA if there is one.

    Returns:
        The rows of `transcripts.jsonl`, in order: `id, text, num_steps, num_drafted, num_accepted`.

    Raises:
        ValueError: an assistant or a language that does not fit, or no clip could be decoded.
        Preempted: SIGTERM came; what was done is saved.
    """
    output_dir = Path(output_dir)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    manifest = read_utterances(manifest_path)
    teacher, processor = load_whisper(teacher_name, device=device), load_processor(teacher_name)
    decoding = DecodingConfig(language=language, max_new_tokens=max_new_tokens)
    tokens = decoding_tokens(teacher_name, teacher, processor.tokenizer, decoding)
    log_mel = WhisperLogMel.for_model(teacher.config).to(device)
    with folder_lock(output_dir):
        rows = read_jsonl(output_dir / "transcripts.jsonl")
        skipped = read_jsonl(output_dir / "skipped.jsonl")
        begun = output_dir / "student"
        draft = RefreshedDraft(
            teacher,
            str(begun) if rows and begun.is_dir() else assistant_name,
            tokens,
            config,
            max_new_tokens=max_new_tokens,
        )
        done = {row["id"] for row in [*rows, *skipped]}
        pending = [index for index, key in enumerate(manifest.ids) if key not in done]
        batches = clip_batches(manifest, pending, sample_rate_hz=SAMPLE_RATE_HZ, batch_size=1, device=device)
        last_save = time.monotonic()
        with sigterm_requests() as termination:
            for batch in tqdm(batches, total=len(pending), desc="transcribe", unit="clip"):
                skipped += batch.skipped
                for utterance in batch.utterances:
                    rows.append({"id": utterance["id"], **_transcribed(draft, log_mel, batch.waveforms, processor)})
                if termination.received or time.monotonic() - last_save > SAVE_SECONDS:
                    _save(output_dir, draft, processor, rows, skipped)
                    last_save = time.monotonic()
                if termination.received:
                    raise Preempted(f"stopped by SIGTERM; what is done is in {output_dir}, the same command resumes")
        if not rows:
            raise ValueError(
                f"none of the {len(manifest)} clips of {manifest_path} could be decoded: {skipped[0]['reason']}"
            )
        if pending:
            _save(output_dir, draft, processor, rows, skipped)
    return rows


def _transcribed(
    draft: RefreshedDraft, log_mel: WhisperLogMel, waveforms: Tensor, processor: WhisperProcessor
) -> dict[str, Any]:
    with torch.no_grad():
        states = draft.teacher.model.encoder(log_mel(waveforms).to(draft.teacher.dtype)).last_hidden_state
    result = draft.decode(states, waveforms.shape[-1] / SAMPLE_RATE_HZ)
    counts = {name: getattr(result, name) for name in ("num_steps", "num_drafted", "num_accepted")}
    return {"text": processor.tokenizer.decode(result.token_ids, skip_special_tokens=True).strip(), **counts}


def _save(
    output_dir: Path,
    draft: RefreshedDraft,
    processor: WhisperProcessor,
    rows: list[dict[str, Any]],
    skipped: list[dict[str, Any]],
) -> None:
    draft.save(output_dir / "student", processor)
    if skipped:
        write_jsonl(output_dir / "skipped.jsonl", skipped)
    write_jsonl(output_dir / "transcripts.jsonl", rows)  # last: rows without their weights would skip lessons


def acceptance(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """`acceptance_rate` (share of drafted tokens) and `accepted_tokens_per_step` of rows of `refresh_on_manifest`."""
    steps, drafted, accepted = (sum(row[name] for row in rows) for name in ("num_steps", "num_drafted", "num_accepted"))
    return {"acceptance_rate": accepted / drafted if drafted else 0.0, "accepted_tokens_per_step": accepted / steps}
