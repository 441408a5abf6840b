"""The utterances of a run and the labels that they are trained on."""

from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from speechkd.config import DataConfig
from speechkd.data.collate import WhisperTokens
from speechkd.data.hub import read_utterances
from speechkd.data.whisper import WhisperTrainSet, pseudo_labelled_set, reference_set
from speechkd.labels.filters import FilterConfig
from speechkd.labels.teacher_cache import LabelStore, check_teacher


def build_set(
    data: DataConfig,
    split: Literal["train", "dev"],
    *,
    filters: FilterConfig,
    identity: dict[str, Any] | None,
    cached_encoder_states: bool,
    tokenizer: PreTrainedTokenizerBase,
    tokens: WhisperTokens,
    output_dir: Path,
) -> tuple[WhisperTrainSet, dict[str, Any]]:
    """The utterances of a split with their labels, and the report of the label filters.

    Args:
        data: manifests and labels.
        split: which of them.
        filters: which pseudo-labels are trained on.
        identity: of the teacher, which must have made the labels; None without one.
        cached_encoder_states: take the encoder's output from the label store.
        tokenizer: of the student, for labels that are the manifest's own text.
        tokens: special ids for the language and task.
        output_dir: run folder, for `skipped.jsonl`.
    """
    manifest = read_utterances(str(data.train_manifest if split == "train" else data.dev_manifest))
    if data.labels_dir is None:
        labelled_set = reference_set(
            manifest,
            tokenizer,
            tokens,
            output_dir=str(output_dir / ("dev" if split == "dev" else "")),
            max_skipped_fraction=data.max_skipped_fraction,
            num_workers=data.num_workers,
        )
        return labelled_set, {}
    store = LabelStore(Path(data.labels_dir) / split)
    if identity is not None:
        check_teacher(store, identity)
    return pseudo_labelled_set(
        manifest,
        store,
        filters,
        cached_encoder_states=cached_encoder_states,
        max_skipped_fraction=data.max_skipped_fraction,
    )
