"""The students of DPHuBERT: with gates in step one, pruned in step two; on disk between the steps and after them."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from speechkd.files import atomic_folder
from speechkd.model_card import card_head, data_section, licence_section, teacher_section, training_section
from speechkd.models.encoder_inputs import encoder_layers
from speechkd.models.pruned_encoder import PrunedEncoderModel, mark_initialized
from speechkd.models.pruning import GatedEncoder, GateKind, LayerProjections
from speechkd.models.speech_encoders import feature_extractor
from speechkd.run_folder import RUN_FILE

PROJECTIONS_FILE = "projections.safetensors"


class FinalStudent(PreTrainedModel):
    """A pruned encoder with the projections that it is trained under in step two.

    Args:
        encoder: what step one left; it becomes a part of this model.
        projections: those of step one.
    """

    main_input_name = "inputs"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, encoder: PrunedEncoderModel, projections: LayerProjections) -> None:
        super().__init__(encoder.config)
        self.encoder, self.projections = encoder, projections
        mark_initialized(self)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the encoder's own."""
        return self.encoder(*args, **kwargs)


def check_layers(teacher: PreTrainedModel, layers: Sequence[int]) -> None:
    """Refuse layers that the teacher does not have.

    Raises:
        ValueError: names them.
    """
    num_layers = len(encoder_layers(teacher))
    if missing := [layer for layer in layers if layer > num_layers]:
        raise ValueError(
            f"loss.layers={list(layers)}: a teacher of {num_layers} layers has no {', '.join(map(str, missing))}; "
            f"choose from 0 to {num_layers}"
        )


def gated_student(
    teacher: PreTrainedModel, gates: Sequence[GateKind], layers: Sequence[int], sparsity: float
) -> GatedEncoder:
    """A copy of the teacher with gates on its parts, and projections for these layers.

    Raises:
        ValueError: such an encoder cannot be pruned, or not by so much.
    """
    student = GatedEncoder(copy.deepcopy(teacher), gates, LayerProjections(teacher.config.hidden_size, layers))
    largest = student.largest_sparsity()
    if sparsity > largest:
        raise ValueError(
            f"pruning.sparsity={sparsity:g}, but gates on {', '.join(gates)} can remove at most {largest:.3f} of this "
            f"encoder's {student.num_full_parameters:,} parameters, and then no layer computes anything; lower it"
        )
    return student


def load_step_one(folder: Path, teacher: dict[str, Any], layers: Sequence[int]) -> FinalStudent:
    """The student and the projections that step one left.

    Args:
        folder: run folder of step one.
        teacher: identity of the teacher of this step.
        layers: that are compared in this step.

    Raises:
        ValueError: step one is not finished, or had another teacher or other layers.
    """
    if not (folder / RUN_FILE).exists():
        raise ValueError(
            f"step distil starts from the pruned student in {folder}, where no finished step one is; run it first, "
            "with --step prune and the same trainer.output_dir"
        )
    run = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    before = run["teacher"]
    if before["weights_sha256"] != teacher["weights_sha256"]:
        raise ValueError(
            f"{folder} was pruned out of {before['name']} (SHA-256 {before['weights_sha256'][:16]}), but the teacher "
            f"is {teacher['name']} ({teacher['weights_sha256'][:16]}); both steps need the same, with the same "
            "teacher.dtype and teacher.window_seconds"
        )
    if run["layers"] != list(layers):
        raise ValueError(
            f"the projections in {folder} are for layers {run['layers']}, but loss.layers={list(layers)}; both steps "
            "need the same"
        )
    encoder = PrunedEncoderModel.from_pretrained(folder / "student")
    projections = LayerProjections(encoder.encoder.config.hidden_size, layers)
    projections.load_state_dict(load_file(folder / "student" / PROJECTIONS_FILE))
    return FinalStudent(encoder, projections)


def save_student(
    encoder: PrunedEncoderModel,
    projections: LayerProjections | None,
    card: str,
    output_dir: Path,
    *,
    normalize_input: bool,
) -> None:
    """Write a pruned encoder, its feature extractor and its card; the folder is complete or absent.

    Args:
        encoder: the student.
        projections: written beside it for step two; None for none.
        card: content of README.md.
        output_dir: the folder.
        normalize_input: whether the encoder expects waveforms of mean 0 and variance 1.
    """
    with atomic_folder(output_dir, replace=True) as temporary:
        encoder.save_pretrained(temporary)
        feature_extractor(encoder.encoder.config, normalize_input=normalize_input).save_pretrained(temporary)
        if projections is not None:
            weights = {name: weight.detach().cpu().contiguous() for name, weight in projections.state_dict().items()}
            save_file(weights, temporary / PROJECTIONS_FILE)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def widths(encoder: PrunedEncoderModel) -> dict[str, Any]:
    """What pruning left, for `run.json` and the model card."""
    config = encoder.config
    return {
        "parameters": encoder.num_parameters(),
        "conv_channels": config.conv_channels,
        "heads": config.num_heads,
        "ffn_units": config.ffn_units,
    }


def model_card(run: dict[str, Any]) -> str:
    """Model card of a pruned encoder."""
    lines = [
        *card_head(run, "feature-extraction", "pruning, speech"),
        f"A speech encoder of {run['parameters'] / 1e6:.1f} M parameters, pruned out of {run['teacher']['name']} "
        f"({run['teacher_parameters'] / 1e6:.1f} M) while it was distilled, as in DPHuBERT. "
        f"{'Step one of two; step two repairs it.' if run['step'] == 'prune' else 'Both steps are done.'} "
        f"Made by speechkd {run['speechkd_version']}.",
        "",
        "Its layers differ in width, which no stock class of transformers can hold. speechkd loads it:",
        "",
        "    from speechkd.models.pruned_encoder import PrunedEncoderModel",
        '    encoder = PrunedEncoderModel.from_pretrained("FOLDER")',
        "",
        '`AutoModel.from_pretrained("FOLDER", trust_remote_code=True)` does without speechkd: it runs the file '
        "`pruned_encoder.py` beside the weights, which needs torch and transformers. `AutoFeatureExtractor` makes its "
        "input of 16 kHz waveforms.",
        "",
        "| part | left |",
        "|---|---|",
        f"| channels of each convolution | {', '.join(map(str, run['conv_channels']))} |",
        f"| heads of each layer | {', '.join(map(str, run['heads']))} |",
        f"| feed-forward units of each layer | {', '.join(map(str, run['ffn_units']))} |",
        "",
        *teacher_section(run),
        *data_section(run, ", audio alone."),
        *training_section(run, "steps in this step", f"target sparsity {run['target_sparsity']:g} of step one, "),
        *licence_section(run, "That of the teacher and of the data."),
    ]
    return "\n".join(lines)
