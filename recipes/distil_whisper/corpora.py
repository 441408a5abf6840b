"""The utterances of a run, the labels that they are trained on, and the batches that they come in."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from speechkd.config import CorpusConfig, DataConfig, StoredOutputs
from speechkd.data.collate import LabelDraws, WhisperTokens, has_timestamps
from speechkd.data.features import SAMPLE_RATE_HZ, WINDOW_SAMPLES
from speechkd.data.hub import read_utterances
from speechkd.data.mixture import MixtureSampler
from speechkd.data.sampler import DurationBatchSampler
from speechkd.data.whisper import WhisperTrainSet, compares_references, pseudo_labelled_set, reference_set
from speechkd.labels.decoder_state_labels import decoder_states_settings
from speechkd.labels.decoding import DecodingConfig
from speechkd.labels.filters import FilterConfig
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError, check_teacher
from speechkd.labels.topk_records import topk_settings

WINDOW_SECONDS = WINDOW_SAMPLES / SAMPLE_RATE_HZ


def check_data(data: DataConfig, decoding: DecodingConfig, filters: FilterConfig, cached_encoder_states: bool) -> None:
    """Refuse settings that cannot go together, before anything is labelled or read.

    Raises:
        ValueError: names the settings.
    """
    stores = [corpus.labels_dir for corpus in data.corpora if corpus.labels_dir is not None]
    if cached_encoder_states:
        if len(stores) < len(data.corpora):
            raise ValueError(
                "teacher.cache_encoder_states needs data.labels_dir, and that of every extra corpus: the label stores "
                "hold the states"
            )
        if data.augment is not None:
            raise ValueError("data.augment changes the audio; set teacher.cache_encoder_states=false for it")
    if len(set(stores)) < len(stores):
        raise ValueError(f"labels_dir stands twice in {', '.join(stores)}; give every corpus a store of its own")
    if data.timestamp_probability > 0 and not decoding.timestamps and (stores or not data.pack):
        raise ValueError(
            f"data.timestamp_probability={data.timestamp_probability:g} needs labels with timestamps; set "
            "decoding.timestamps=true and label with it, or the probability to 0"
        )
    if data.pack and stores and compares_references(filters) and (cached_encoder_states or not decoding.timestamps):
        raise ValueError(
            "data.pack with a WER or CER filter needs decoding.timestamps=true, by which windows are cut into clips "
            "that are judged one by one, and teacher.cache_encoder_states=false, since those that pass are joined to "
            "new windows; or set filters.max_wer=null"
        )


def build_sets(
    data: DataConfig,
    decoding: DecodingConfig,
    filters: FilterConfig,
    *,
    identity: dict[str, Any] | None,
    cached_encoder_states: bool,
    stored_outputs: StoredOutputs | None,
    tokenizer: PreTrainedTokenizerBase,
    tokens_of: Callable[[DecodingConfig], WhisperTokens],
    output_dir: Path,
) -> tuple[list[WhisperTrainSet], WhisperTrainSet | None, dict[str, Any]]:
    """The corpora with their labels, the development set, and the reports of the label filters by manifest.

    Args:
        data: manifests and labels.
        decoding: language and task of the labels; a corpus may have another language.
        filters: which pseudo-labels are trained on.
        identity: of the teacher, which must have made the labels; None without one.
        cached_encoder_states: take the encoder's output from the label stores.
        stored_outputs: what the label stores must have of the teacher's decoder; None for nothing.
        tokenizer: of the student.
        tokens_of: special ids for a language and task.
        output_dir: run folder, for `skipped.jsonl`.
    """

    def build(corpus: CorpusConfig, split: str, skipped_dir: Path) -> tuple[WhisperTrainSet, dict[str, Any]]:
        spoken = decoding if corpus.language is None else replace(decoding, language=corpus.language)
        tokens, manifest = tokens_of(spoken), read_utterances(corpus.train_manifest)
        if corpus.labels_dir is None:
            labelled_set = reference_set(
                manifest,
                tokenizer,
                tokens,
                output_dir=str(skipped_dir),
                max_skipped_fraction=data.max_skipped_fraction,
                num_workers=data.num_workers,
                pack=data.pack,
            )
            return labelled_set, {}
        store = LabelStore(Path(corpus.labels_dir) / split)
        if identity is not None:
            check_teacher(store, identity)
        _check_decoding(store, spoken, data.pack)
        if stored_outputs is not None:  # a store without is refused
            {"topk": topk_settings, "decoder_states": decoder_states_settings}[stored_outputs](store)
        labelled_set, report = pseudo_labelled_set(
            manifest,
            store,
            filters,
            tokenizer=tokenizer,
            tokens=tokens,
            cached_encoder_states=cached_encoder_states,
            max_skipped_fraction=data.max_skipped_fraction,
        )
        labelled_set.topk = store if stored_outputs == "topk" else None
        labelled_set.decoder_states = store if stored_outputs == "decoder_states" else None
        return labelled_set, report

    corpora, reports = [], {}
    for number, corpus in enumerate(data.corpora):
        skipped_dir = output_dir / f"corpus-{number}" if number else output_dir
        corpus_set, reports[corpus.train_manifest] = build(corpus, "train", skipped_dir)
        corpora.append(corpus_set)
    dev_set = None
    if data.dev_manifest is not None:
        dev = CorpusConfig(train_manifest=data.dev_manifest, labels_dir=data.labels_dir)
        dev_set, _ = build(dev, "dev", output_dir / "dev")
    return corpora, dev_set, reports


def _check_decoding(store: LabelStore, decoding: DecodingConfig, pack: bool) -> None:
    labelled = store.header["decoding"]
    for name, wanted in (("language", decoding.language), ("task", decoding.task)):
        if labelled[name] != wanted:
            raise LabelStoreError(
                f"the labels in {store.folder} were made with {name} {labelled[name]!r}, the configuration has "
                f"{wanted!r}; correct it, or label again into another folder"
            )
    if labelled.get("pack", False) != pack:
        found, option = ("single clips", "with --pack") if pack else ("windows (--pack)", "without --pack")
        raise LabelStoreError(
            f"the labels in {store.folder} are of {found}, the configuration has data.pack={str(pack).lower()}; change "
            f"that, or label again {option} into another folder"
        )


def label_draws(data: DataConfig, corpora: Sequence[WhisperTrainSet], tokens: WhisperTokens, seed: int) -> LabelDraws:
    """What is drawn of the labels; probabilities that can never act are refused.

    Raises:
        ValueError: names the probability and what the labels lack.
    """
    timestamps, previous = data.timestamp_probability, data.previous_text_probability
    if timestamps > 0 and not any(has_timestamps(label, tokens) for corpus in corpora for label in corpus.token_ids):
        raise ValueError(
            f"data.timestamp_probability={timestamps:g}, but no label has timestamps; label again with --timestamps "
            "(decoding.timestamps=true) into another folder, or set it to 0"
        )
    if previous > 0 and all(before is None for corpus in corpora for before in corpus.previous):
        raise ValueError(
            f"data.previous_text_probability={previous:g}, but no label has one before it; set data.pack=true, "
            "give the manifest segments of recordings (offset_seconds), or set it to 0"
        )
    return LabelDraws(timestamp_probability=timestamps, previous_text_probability=previous, seed=seed)


def batch_sampler(
    corpora: Sequence[WhisperTrainSet],
    weights: Sequence[float],
    max_batch_seconds: float,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Sampler[list[int]]:
    """Batches of labels of similar lengths, each of one corpus. Whisper pads every clip to its window."""
    samplers = [
        DurationBatchSampler(
            np.full(len(corpus), WINDOW_SECONDS),
            max_batch_seconds,
            seed=seed,
            rank=rank,
            world_size=world_size,
            sort_keys=corpus.label_lengths,
        )
        for corpus in corpora
    ]
    return samplers[0] if len(samplers) == 1 else MixtureSampler(samplers, weights)
