"""What a teacher makes of a clip, at the student's frames: codes or states, from a label store or from the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from speechkd.frame_encoders import FrameEncoder, load_frame_encoder
from speechkd.labels.mvq_codes import mvq_settings, read_codes
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError, check_teacher
from speechkd.losses.codebook import align_codes
from speechkd.losses.contract import IGNORE_INDEX
from speechkd.models.quantizer import Quantizer, QuantizerError, load_quantizer

Distillation = Literal["none", "l1", "l2", "mvq"]


@dataclass(kw_only=True)
class TeacherConfig:
    """The speech encoder one of whose layers is learnt.

    Args:
        name: HuBERT, wav2vec 2.0, WavLM, data2vec-audio, w2v-BERT or Whisper, whose encoder is taken: Hub id, folder or
            `bundled:<name>`.
        layer: 0 is what the first block hears, 1 the output of the first block.
        quantizer_dir: folder of the quantizer, fitted by the encode stage where it is missing; for mvq alone.
        codes_dir: folder of the label stores `train` and `dev` with its codes; null runs the teacher in every step.
        states_dir: the same with states in float16, for l1 and l2; null runs the teacher in every step.
        license: licence of its weights, for the student's model card.
    """

    name: str
    layer: int
    quantizer_dir: str | None = None
    codes_dir: str | None = None
    states_dir: str | None = None
    license: str | None = None

    def store_dir(self, kd: Distillation) -> str | None:
        """Where the targets are stored; None for a live teacher."""
        return self.codes_dir if kd == "mvq" else self.states_dir


@dataclass(frozen=True)
class FrameAlignment:
    """From a teacher's frames to the student's; see `align_codes`.

    Args:
        teacher_rate_hz: frames a second.
        student_rate_hz: of the student.
        delay_frames: student frames by which the student is late.
    """

    teacher_rate_hz: float
    student_rate_hz: float
    delay_frames: int = 0

    @property
    def per_frame(self) -> int:
        """Frames of the teacher to one of the student, 1 or more."""
        return max(1, round(self.teacher_rate_hz / self.student_rate_hz))

    def codes(self, codes: Tensor, num_frames: int) -> Tensor:
        """Codes (teacher frames, codebooks) to (num_frames, per_frame * codebooks), int64, -100 where there is none."""
        rates = {"teacher_rate_hz": self.teacher_rate_hz, "student_rate_hz": self.student_rate_hz}
        return align_codes(codes[None], num_frames, **rates, delay_frames=self.delay_frames)[0]

    def states(self, states: Tensor, num_frames: int) -> tuple[Tensor, Tensor]:
        """States (teacher frames, width) to (num_frames, per_frame, width), and True where there is one."""
        frames = self.codes(torch.arange(len(states), device=states.device)[:, None], num_frames)
        mask = frames != IGNORE_INDEX
        return states[frames.clamp(min=0)] * mask[..., None], mask


@dataclass(frozen=True)
class Targets:
    """Of which kind and size the targets of a run are, and where they come from.

    Args:
        teacher: identity of the teacher.
        alignment: to the student's frames.
        store: that holds them; None for a live teacher.
        encoder: the live teacher, with this layer alone; None with a store.
        layer: which of its layers.
        quantizer: of codes; None for states.
        width: of the teacher's states.
    """

    teacher: dict[str, Any]
    alignment: FrameAlignment
    store: LabelStore | None
    encoder: FrameEncoder | None
    layer: int
    quantizer: Quantizer | None
    width: int

    def stored(self, utterance_id: str, num_frames: int, *, is_known: bool) -> dict[str, Tensor]:
        """Targets of one clip out of the store; all are missing where the store does not know it."""
        assert self.store is not None
        shape = (num_frames, self.alignment.per_frame)
        if self.quantizer is not None:
            if not is_known:
                return {"codes": torch.full((num_frames, shape[1] * self.quantizer.num_codebooks), IGNORE_INDEX)}
            return {"codes": self.alignment.codes(read_codes(self.store, utterance_id, self.quantizer.id), num_frames)}
        if not is_known:
            return {"states": torch.zeros(*shape, self.width).half(), "states_mask": torch.zeros(shape).bool()}
        states, mask = self.alignment.states(self.store.array(utterance_id)[0], num_frames)
        return {"states": states, "states_mask": mask}

    @torch.no_grad()
    def live(self, waveforms: Tensor, num_samples: Sequence[int], num_frames: Sequence[int]) -> dict[str, Tensor]:
        """Targets of a batch from the teacher itself.

        Args:
            waveforms: 16 kHz samples in [-1, 1], (batch, samples).
            num_samples: length of each clip.
            num_frames: of the student.
        """
        assert self.encoder is not None
        clips = [clip[:length] for clip, length in zip(waveforms, num_samples, strict=True)]
        groups = [clips] if self.encoder.pads else [[clip] for clip in clips]  # others would hear the padding
        states = [clip for group in groups for clip in layer_of_clips(self.encoder, group, waveforms.device)]
        if self.quantizer is None:
            return collate_targets(
                [
                    dict(zip(("states", "states_mask"), self.alignment.states(clip, frames), strict=True))
                    for clip, frames in zip(states, num_frames, strict=True)
                ]
            )
        codes = self.quantizer.search(torch.cat(states)).split([len(clip) for clip in states])
        return collate_targets(
            [{"codes": self.alignment.codes(clip, frames)} for clip, frames in zip(codes, num_frames, strict=True)]
        )

    def check_lengths(self, frames_of: dict[str, int], rows: dict[str, int]) -> None:
        """Refuse a store whose clips have other lengths than the student's frames make of them.

        Args:
            frames_of: student frames of each clip, by id.
            rows: teacher frames in the store, by id.

        Raises:
            LabelStoreError: names the first such clip.
        """
        for key, num_frames in frames_of.items():
            if key in rows:
                try:
                    self.alignment.codes(torch.zeros(rows[key], 1, dtype=torch.uint8), num_frames)
                except ValueError as error:
                    folder = "the store" if self.store is None else self.store.folder
                    raise LabelStoreError(f"{folder}, utterance {key!r}: {error}") from error


def layer_of_clips(encoder: FrameEncoder, waveforms: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """States of each clip, (frames, width), float32, of an encoder with one layer.

    Args:
        encoder: the teacher.
        waveforms: 16 kHz samples of each clip, (samples,); of clips of different lengths the encoder must take padding.
        device: where it is.
    """
    padded = pad_sequence(list(waveforms), batch_first=True)
    num_samples = torch.tensor([len(waveform) for waveform in waveforms])
    states, num_frames = encoder.encode(padded.to(device), num_samples)
    return [clip[0, :frames].float() for clip, frames in zip(states, num_frames.tolist(), strict=True)]


def collate_targets(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Targets of a batch, padded on the right: codes with -100, states with 0 and False."""
    padding = {"codes": IGNORE_INDEX, "states": 0.0, "states_mask": False}
    return {
        name: pad_sequence([item[name] for item in items], batch_first=True, padding_value=padding[name])
        for name in padding
        if name in items[0]
    }


def open_targets(
    config: TeacherConfig,
    kd: Distillation,
    student_rate_hz: float,
    split: str,
    *,
    delay_frames: int = 0,
    device: torch.device | str = "cpu",
) -> Targets | None:
    """The targets of a split; None where nothing is distilled.

    Args:
        config: teacher, quantizer and stores.
        kd: what is distilled.
        student_rate_hz: of the student's states.
        split: "train" or "dev".
        delay_frames: see `FrameAlignment`.
        device: of a live teacher and its quantizer.

    Raises:
        LabelStoreError: the store is of another teacher, layer or quantizer, or has other targets.
        QuantizerError: the quantizer is of another teacher or layer.
    """
    if kd == "none":
        return None
    folder = config.store_dir(kd)
    quantizer = None
    if kd == "mvq":
        quantizer = load_quantizer(str(config.quantizer_dir)).to(device)
        _check_quantizer(config, quantizer)
    if folder is None:
        encoder = load_frame_encoder(config.name, layers=[config.layer], device=device)
        if quantizer is not None:
            _check_teacher_of(quantizer, encoder.identity, config)
        facts = {"width": encoder.width, "frame_rate_hz": encoder.frames_per_second}
        identity, store = encoder.identity, None
    else:
        store, encoder = LabelStore(Path(folder) / split), None
        identity = store.header["teacher"]
        if quantizer is not None:
            entry, _ = mvq_settings(store, quantizer)
            check_teacher(store, (quantizer.source or {})["teacher"])
            facts = {"width": entry["dim"], "frame_rate_hz": store.header["mvq"]["frame_rate_hz"]}
        else:
            facts = _stored_states(store, config)
        if identity["name"] != config.name:
            raise LabelStoreError(
                f"the targets in {store.folder} come from teacher {identity['name']}, but teacher.name={config.name}; "
                "give that name, or encode with this teacher into another folder"
            )
    return Targets(
        teacher=identity,
        alignment=FrameAlignment(facts["frame_rate_hz"], student_rate_hz, delay_frames),
        store=store,
        encoder=encoder,
        layer=config.layer,
        quantizer=quantizer,
        width=facts["width"],
    )


def _check_quantizer(config: TeacherConfig, quantizer: Quantizer) -> None:
    source = quantizer.source
    if source is None or source["layer"] != config.layer:
        of = "does not say of which layer it is" if source is None else f"is of layer {source['layer']}"
        raise QuantizerError(
            f"quantizer {quantizer.id} in {config.quantizer_dir} {of}, but teacher.layer={config.layer}; set "
            "teacher.layer to its own, or fit one on this layer into another teacher.quantizer_dir"
        )


def _check_teacher_of(quantizer: Quantizer, identity: dict[str, Any], config: TeacherConfig) -> None:
    fitted_on = (quantizer.source or {})["teacher"]
    if fitted_on["weights_sha256"] != identity["weights_sha256"]:
        raise QuantizerError(
            f"quantizer {quantizer.id} in {config.quantizer_dir} was fitted on teacher {fitted_on['name']} (weights "
            f"{fitted_on['weights_sha256'][:12]}), but this run has {identity['name']} (weights "
            f"{identity['weights_sha256'][:12]}); take its own teacher, or fit another quantizer"
        )


def _stored_states(store: LabelStore, config: TeacherConfig) -> dict[str, Any]:
    facts = store.header.get("hidden_states")
    if facts is None or facts["layers"] != [config.layer]:
        found = f"targets {store.header['targets']}" if facts is None else f"states of layers {facts['layers']}"
        raise LabelStoreError(
            f"{store.folder} holds {found}, but states of layer {config.layer} are asked for; run the encode stage "
            "into another teacher.states_dir"
        )
    return facts
