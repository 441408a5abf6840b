"""SEGUE: a speech encoder whose mean over frames is the sentence embedding of what is said.

Tan et al. 2023, https://arxiv.org/abs/2305.12301. Any wav2vec 2.0, HuBERT, WavLM, data2vec-audio or Whisper encoder
learns the embeddings of a frozen `speechkd.teachers_text.SentenceTeacher`, live or from the label store.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from speechkd.data.features import (
    SAMPLE_RATE_HZ,
    SAMPLES_PER_POSITION,
    WhisperLogMel,
    WhisperWindow,
    normalize_waveforms,
    padding_mask,
)
from speechkd.files import atomic_write, write_json
from speechkd.losses.embedding import info_nce
from speechkd.losses.hidden import hidden_cosine, hidden_mse
from speechkd.models.encoder_inputs import WAVEFORM_ENCODERS, convolutions_field_samples
from speechkd.models.speech_encoders import save_encoder
from speechkd.models.whisper_states import embed_features, run_layers
from speechkd.teachers import teacher_identity
from speechkd.teachers_text import masked_mean

Objective = Literal["mse", "cosine", "info_nce"]
POOLING_FILE, PROJECTION_FILE = "pooling.json", "projection.safetensors"
HOW = (
    "embedding = mean over the valid frames of the last hidden state, then projection.safetensors (weight x + bias) "
    "where there is one; padded frames are left out. "
)
HOW_WAVEFORM = "AutoModel.from_pretrained(folder) loads the encoder; AutoFeatureExtractor makes its input."
HOW_WHISPER = (
    "AutoModel.from_pretrained(folder).encoder is the encoder, the decoder beside it is empty; a clip of n samples at "
    "16 kHz has ceil(n / 320) valid frames. The log-mel is cut after n rounded up to grid_seconds, and the positions "
    "too; null stands for 30 s."
)


class SegueEncoder(PreTrainedModel):
    """A speech encoder, mean pooling over the valid frames, and a linear map to the teacher's width where it differs.

    The dropouts in the feed-forward of the last layer are off, as while SEGUE distils; see `set_last_ffn_dropout`.

    Args:
        encoder: model of `WAVEFORM_ENCODERS`, or the encoder of a Whisper; it becomes a part of this one.
        embedding_dim: width of the embeddings; None is the encoder's own, which needs no map.
        num_frozen_layers: lower layers, and all before them, that stay as they are; their states can be cached.
        normalize_input: scale each waveform to mean 0 and variance 1, as the encoder was trained; not for Whisper.
        grid_seconds: Whisper hears each clip rounded up to a multiple of this; None is 30 s, as it was trained.

    Raises:
        ValueError: another kind of encoder, or an argument that does not fit it.
    """

    main_input_name = "waveforms"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True

    def __init__(
        self,
        encoder: PreTrainedModel,
        *,
        embedding_dim: int | None = None,
        num_frozen_layers: int = 0,
        normalize_input: bool = True,
        grid_seconds: float | None = None,
    ) -> None:
        config = encoder.config
        _check_kind(config, grid_seconds)
        super().__init__(config)
        self.encoder: Any = encoder
        self.is_whisper = config.model_type == "whisper"
        self.embedding_dim = config.hidden_size if embedding_dim is None else embedding_dim
        has_own_width = self.embedding_dim == config.hidden_size
        self.projection = None if has_own_width else nn.Linear(config.hidden_size, self.embedding_dim)
        self.window = WhisperWindow(grid_seconds=grid_seconds)
        self.log_mel: Any = None
        if self.is_whisper:  # its window may have been shortened
            self.log_mel = WhisperLogMel.for_model(config)  # type: ignore[arg-type]
            self.window = WhisperWindow(self.log_mel.max_samples / SAMPLE_RATE_HZ, grid_seconds)
        self.normalize_input, self.grid_seconds = normalize_input and not self.is_whisper, grid_seconds
        self.num_frozen_layers, self._is_frozen = num_frozen_layers, False
        self._freeze_lower()
        self.set_last_ffn_dropout(False)
        self.post_init()
        self.train()  # what is frozen is in eval mode from the start

    def _init_weights(self, module: nn.Module) -> None:
        pass  # the encoder comes with weights, and torch's own start is right for the projection

    @property
    def stack(self) -> Any:
        """The part of the encoder that holds its `layers`."""
        return self.encoder if self.is_whisper else self.encoder.encoder

    @property
    def num_layers(self) -> int:
        """Layers of the encoder."""
        return len(self.stack.layers)

    @property
    def has_final_norm(self) -> bool:
        """Whether a normalisation comes after the last layer, and not before the first."""
        return self.is_whisper or getattr(self.config, "do_stable_layer_norm", False)

    def num_frames(self, num_samples: Tensor) -> Tensor:
        """Valid frames, over which the mean goes, of clips with these lengths at 16 kHz; same shape, int64."""
        if self.is_whisper:
            return (num_samples + SAMPLES_PER_POSITION - 1) // SAMPLES_PER_POSITION
        return self.encoder._get_feat_extract_output_lengths(num_samples).clamp(min=0)

    def num_states(self, num_samples: Tensor) -> Tensor:
        """Frames that the layers see: the valid ones, and for Whisper those up to the grid or to 30 s."""
        return self.window.num_positions(num_samples) if self.is_whisper else self.num_frames(num_samples)

    def forward(
        self, waveforms: Tensor | None = None, num_samples: Tensor | None = None, states: Tensor | None = None
    ) -> Tensor:
        """Embeddings of a batch of clips.

        Args:
            waveforms: 16 kHz samples, padded to a common length, (batch, samples); None with `states`.
            num_samples: length of each clip, (batch,), int64.
            states: what `lower_states` gave for these clips, (batch, frames, width), instead of the waveforms.

        Returns:
            (batch, embedding_dim), float32.

        Raises:
            ValueError: see `frame_states`.
        """
        if num_samples is None:
            raise ValueError("num_samples is missing; give the length of each clip without its padding, (batch,)")
        return self.project(masked_mean(*self.frame_states(waveforms, num_samples, states)))

    def project(self, pooled: Tensor) -> Tensor:
        """The map to the teacher's width, (..., embedding_dim), float32; nothing where there is none."""
        return pooled if self.projection is None else self.projection(pooled.to(self.projection.weight.dtype)).float()

    def frame_states(
        self, waveforms: Tensor | None, num_samples: Tensor, states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Last hidden states, (batch, frames, width), and a mask that is True on valid frames, (batch, frames), bool.

        Arguments are those of `forward`.

        Raises:
            ValueError: lengths, waveforms or states do not fit each other, or a clip is too short for one frame.
        """
        num_frames = self.num_frames(num_samples)
        self._check_lengths(num_samples, num_frames)
        if states is None and self.num_frozen_layers:
            states = self.lower_states(waveforms, num_samples)
        if states is not None:
            last = self._upper(states, num_samples)
        elif waveforms is None:
            raise ValueError("neither waveforms nor states were given; one of them must be")
        elif self.is_whisper:
            inputs, mask = self._whisper_inputs(waveforms, num_samples)
            last = self.stack.layer_norm(self._run_layers(inputs, mask, 0, self.num_layers))
        else:
            last = self.encoder(**self._waveform_inputs(waveforms, num_samples)).last_hidden_state
        return last, padding_mask(num_frames, last[..., 0])

    @torch.no_grad()
    def lower_states(self, waveforms: Tensor | None, num_samples: Tensor) -> Tensor:
        """States after the frozen layers, (batch, frames, width), for the label store; row i has `num_states` of them.

        Raises:
            ValueError: no layer is frozen, there are no waveforms, or the lengths do not fit.
        """
        if not self.num_frozen_layers:
            raise ValueError("num_frozen_layers=0: no states can be kept, since every layer learns; freeze 1 or more")
        if waveforms is None:
            raise ValueError("neither waveforms nor states were given; one of them must be")
        self._check_lengths(num_samples, self.num_frames(num_samples))
        if self.is_whisper:
            return self._run_layers(*self._whisper_inputs(waveforms, num_samples), 0, self.num_frozen_layers)
        layers, kept = self.stack.layers, []
        hook = layers[self.num_frozen_layers - 1].register_forward_hook(lambda *call: kept.append(_states_of(call[-1])))
        self.stack.layers = layers[: self.num_frozen_layers]
        try:
            self.encoder(**self._waveform_inputs(waveforms, num_samples))
        finally:
            self.stack.layers = layers
            hook.remove()
        return kept[0]

    def lower_identity(self, name: str) -> dict[str, Any]:
        """What states of the frozen layers are kept under, as of `teacher_identity`; training does not change it."""
        prefix = "layers." if self.is_whisper else "encoder.layers."
        upper = tuple(f"{prefix}{layer}." for layer in range(self.num_frozen_layers, self.num_layers))
        if self.has_final_norm:
            upper += (prefix.replace("layers.", "layer_norm."),)
        unused = ("masked_spec_embed", *upper)
        lower = {key: weight for key, weight in self.encoder.state_dict().items() if not key.startswith(unused)}
        part = SimpleNamespace(state_dict=lambda: lower, config=self.config)
        return teacher_identity(name, cast(PreTrainedModel, part))

    def set_last_ffn_dropout(self, active: bool) -> None:
        """Switch the dropouts in the last layer's feed-forward to the encoder's own rates, or off.

        SEGUE switches them off while it distils, and on for fine-tuning, but for few-shot. A saved encoder has its own
        rates in either case. In Whisper one of the two also serves the layer's attention.
        """
        layer, config = self.stack.layers[-1], self.config
        if self.is_whisper:
            layer.activation_dropout, layer.dropout = (config.activation_dropout, config.dropout) if active else (0, 0)
        else:
            layer.feed_forward.intermediate_dropout.p = config.activation_dropout if active else 0.0
            layer.feed_forward.output_dropout.p = config.hidden_dropout if active else 0.0

    def freeze(self) -> "SegueEncoder":
        """Stop all learning, for transfer with a head alone: no gradients, and eval mode whatever surrounds it."""
        self._is_frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self, mode: bool = True) -> "SegueEncoder":
        """As for any module, but what is frozen stays in eval mode."""
        super().train(mode and not self._is_frozen)
        if self.num_frozen_layers:
            self.encoder.eval()
            for layer in self.stack.layers[self.num_frozen_layers :]:
                layer.train(self.training)
        return self

    def save_encoder(self, folder: str | Path, teacher: dict[str, Any] | None = None) -> None:
        """Save what stock transformers loads, with a note of how to pool; `pooling.json` comes last.

        Args:
            folder: created where it is missing. `AutoModel` gives the encoder; of a Whisper a WhisperModel whose
                decoder has no layers and one token.
            teacher: identity of the teacher, for the note.
        """
        folder = Path(folder)
        save_encoder(self.encoder, folder, normalize_input=self.normalize_input)
        if self.projection is not None:
            with atomic_write(folder / PROJECTION_FILE) as temporary:
                weights = {key: weight.detach().cpu() for key, weight in self.projection.state_dict().items()}
                save_file(weights, temporary, metadata={"format": "pt"})
        note = {
            "pooling": "mean",
            "sample_rate_hz": SAMPLE_RATE_HZ,
            "embedding_dim": self.embedding_dim,
            "normalize_input": self.normalize_input,
            "grid_seconds": self.grid_seconds,
            "teacher": teacher,
            "how": HOW + (HOW_WHISPER if self.is_whisper else HOW_WAVEFORM),
        }
        write_json(folder / POOLING_FILE, note)

    def _check_lengths(self, num_samples: Tensor, num_frames: Tensor) -> None:
        if not num_samples.numel():
            raise ValueError("the batch has no clip; leave such a batch out")
        if (num_frames < 1).any():
            row = int((num_frames < 1).nonzero()[0])
            raise ValueError(
                f"clip {row} of the batch has {int(num_samples[row])} samples and so not one frame: the encoder needs "
                f"{self.receptive_field_samples} samples for one; leave this clip out, or pad it with silence"
            )

    @property
    def receptive_field_samples(self) -> int:
        """The shortest clip that gives a frame."""
        return 1 if self.is_whisper else convolutions_field_samples(self.config)

    def _freeze_lower(self) -> None:
        if not 0 <= self.num_frozen_layers < self.num_layers:
            raise ValueError(
                f"num_frozen_layers={self.num_frozen_layers} of {self.num_layers} layers leaves nothing to learn, or "
                f"is negative; choose 0 to {self.num_layers - 1}"
            )
        if self.num_frozen_layers:
            self.encoder.requires_grad_(False)
            self.stack.layers[self.num_frozen_layers :].requires_grad_(True)
            self.stack.layer_norm.requires_grad_(self.has_final_norm)

    def _waveform_inputs(self, waveforms: Tensor, num_samples: Tensor) -> dict[str, Tensor | None]:
        if self.normalize_input:
            values, mask = normalize_waveforms(waveforms, num_samples)
        else:
            mask = padding_mask(num_samples, waveforms)
            values = waveforms.float().masked_fill(~mask, 0.0)
        return {"input_values": values.to(self.dtype), "attention_mask": None if mask.all() else mask}

    def _whisper_inputs(self, waveforms: Tensor, num_samples: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the first layer gets, and its attention mask.

        In a batch of different windows each clip is zeroed after its own before each convolution, as its edge is when
        it is alone, and no frame attends past it: the embedding does not depend on the batch.
        """
        real = padding_mask(num_samples, waveforms)
        num_states = self.num_states(num_samples)
        width = int(num_states.max())
        heard = max(int(num_samples.max()), self.log_mel.max_samples)  # a batch may be padded beyond the window
        features = self.log_mel(waveforms.masked_fill(~real, 0.0)[:, :heard])[..., : 2 * width].to(self.dtype)
        outside = ~padding_mask(num_states, features[:, 0, ::2])
        states = embed_features(self.stack, features, outside)
        return states, self._attention_mask(states, ~outside)

    def _attention_mask(self, states: Tensor, inside: Tensor) -> Tensor | None:
        """The mask as the encoder's layers want it; None where every frame counts."""
        if inside.all():
            return None
        if self.config.model_type == "wavlm":  # its layers take the plain mask
            return inside
        return create_bidirectional_mask(config=self.config, inputs_embeds=states, attention_mask=inside)

    def _upper(self, states: Tensor, num_samples: Tensor) -> Tensor:
        if not self.num_frozen_layers:
            raise ValueError("states were given, but num_frozen_layers=0: every layer learns; give waveforms")
        num_states = self.num_states(num_samples)
        if states.ndim != 3 or len(states) != len(num_states) or states.shape[1] < int(num_states.max()):
            raise ValueError(
                f"states {tuple(states.shape)} do not fit {len(num_states)} clips of up to {int(num_states.max())} "
                "frames; give what lower_states made of the same clips with the same grid_seconds"
            )
        states = states.to(self.dtype)
        inside = padding_mask(num_states, states[..., 0])
        states = torch.where(inside[..., None], states, 0.0)
        last = self._run_layers(states, self._attention_mask(states, inside), self.num_frozen_layers, self.num_layers)
        return self.stack.layer_norm(last) if self.has_final_norm else last

    def _run_layers(self, states: Tensor, mask: Tensor | None, first: int, end: int) -> Tensor:
        """States after the layers from `first` up to `end`, as the encoder's own forward pass runs them."""
        extra = {}
        if self.config.model_type == "wavlm":  # the first layer has the position bias of all
            bias = self.stack.layers[0].attention.compute_bias(states.shape[1], states.shape[1])
            extra["position_bias"] = bias.repeat(len(states), 1, 1)
        layerdrop = self.config.encoder_layerdrop if self.is_whisper else self.config.layerdrop
        for after in run_layers(self.stack.layers[first:end], states, mask=mask, layerdrop=layerdrop, **extra):
            states = after
        return states


def embedding_loss(student: Tensor, teacher: Tensor, objective: Objective = "mse", temperature: float = 0.05) -> Tensor:
    """What pulls the student's embeddings to the teacher's, summed over the items.

    Args:
        student: (batch, dim).
        teacher: same shape; gets no gradient.
        objective: "mse" is the mean over the width of the squared difference: SEGUE's squared norm is `dim` times it,
            which AdamW does not see but the clipping of gradients does. "cosine" is 1 - cos. "info_nce" finds the
            teacher's embedding of the same item among those of the batch.
        temperature: of "info_nce".

    Returns:
        0-dim, float32; divide by the items of the whole step.

    Raises:
        ValueError: the objective is unknown, or the shapes do not fit.
    """
    if objective == "mse":
        return hidden_mse(student, teacher, reduction="sum")
    if objective == "cosine":
        return hidden_cosine(student, teacher, reduction="sum")
    if objective == "info_nce":
        return info_nce(student, teacher, reduction="sum", temperature=temperature)
    raise ValueError(f"objective must be mse, cosine or info_nce, got {objective!r}")


def _check_kind(config: Any, grid_seconds: float | None) -> None:
    if config.model_type != "whisper" and config.model_type not in WAVEFORM_ENCODERS:
        raise ValueError(
            f"speech encoder of type {config.model_type!r} is not known here; take {', '.join(WAVEFORM_ENCODERS)} or "
            "the encoder of a Whisper"
        )
    if getattr(config, "add_adapter", False):
        raise ValueError("the encoder has an adapter that shortens its output (add_adapter); take one without")
    if grid_seconds is not None and config.model_type != "whisper":
        raise ValueError(f"grid_seconds={grid_seconds} is for Whisper; a {config.model_type} hears each clip as it is")


def _states_of(output: Any) -> Tensor:
    """States of a layer's output; WavLM's also holds the position bias."""
    return output[0] if isinstance(output, tuple) else output
