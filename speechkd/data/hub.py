"""Datasets of the Hugging Face Hub, or folders in its layouts, as utterances: memory-mapped or streamed.

The audio stays encoded, as bytes or a path; `speechkd.data.audio` decodes it, not `datasets`.
"""

import hashlib
import io
import logging
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import soundfile
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset

from speechkd.data.manifest import FIELDS, MAX_PROBLEMS_SHOWN, Manifest, read_manifest

logger = logging.getLogger(__name__)

SOURCE = re.compile(r"hub:(?P<name>[^:]+)(:(?P<config>[^:\[]+))?:(?P<split>[^:\[]+(\[[^\]]*\][^:\[]*)*)")
# The names in LibriSpeech, MLS, Common Voice, FLEURS, VoxPopuli, GigaSpeech, MInDS-14 and Speech Commands on the Hub.
# The first one present is taken: FLEURS keeps case and punctuation in raw_transcription alone, and spells its language
# out in `language` where lang_id has a code.
COLUMNS = {
    "id": ("id", "utt_id", "utterance_id", "audio_id", "segment_id", "__key__"),
    "text": ("text", "sentence", "raw_transcription", "transcription", "normalized_text", "transcript"),
    "speaker": ("speaker_id", "client_id", "speaker"),
    "dialect": ("variant", "dialect", "accents", "accent"),
    "language": ("locale", "lang_id", "language"),
    "intent": ("intent", "intent_class", "label"),
}
DESCRIPTION = {
    **{field: feature for field, feature in FIELDS.items() if field != "audio"},
    "stem": datasets.Value("string"),
    "number": datasets.Value("string"),
    "problem": datasets.Value("string"),
}
BEGINNING: dict[str, Any] = {"block": 0, "position": 0, "files": None}  # of a stream; files: the state of `datasets`
VERSION = 2  # raised when `_describe` changes: `datasets` would take the rows that an older one left in its cache


class EncodedAudio(datasets.Audio):
    """An audio column that stays encoded. `datasets.Audio` wants torchcodec even to pass a path or bytes through."""

    def encode_example(self, value: Any) -> dict[str, Any]:
        if isinstance(value, (str, os.PathLike)):
            return {"bytes": None, "path": str(value)}
        if isinstance(value, (bytes, bytearray)):
            return {"bytes": bytes(value), "path": None}
        return {"bytes": value.get("bytes"), "path": value.get("path")}


class HubManifest(Manifest):
    """Utterances of one split. `audio` is the encoded file as bytes, or its path where the dataset has only paths."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        utterance = self.rows[int(index)]
        return {**utterance, "audio": _encoded(utterance["audio"])}

    def select(self, indices: Iterable[int]) -> "HubManifest":
        """The utterances at these positions, in this order."""
        return HubManifest(self.path, self.rows.select(list(indices)))


def read_utterances(source: str | Path) -> Manifest:
    """Open a JSONL manifest, or a split of a Hub dataset written as `hub:NAME[:CONFIG]:SPLIT`.

    NAME is a dataset of the Hub or a local folder, SPLIT may be a slice: `hub:google/fleurs:en_us:train`,
    `hub:data/my_corpus:validation`, `hub:openslr/librispeech_asr:clean:test[:100]`.

    Raises:
        ManifestError: the manifest is not valid.
        ValueError: the source is written otherwise, or the dataset cannot be used.
    """
    if not str(source).startswith("hub:"):
        return read_manifest(source)
    match = SOURCE.fullmatch(str(source))
    if match is None:
        raise ValueError(
            f"{str(source)!r} is not hub:NAME[:CONFIG]:SPLIT; write for example hub:google/fleurs:en_us:train, or "
            "hub:FOLDER:train with a folder that has no colon in its name"
        )
    return read_hub_dataset(match["name"], match["config"], match["split"])


def read_hub_dataset(
    name: str, config: str | None, split: str, *, audio_column: str | None = None, text_column: str | None = None
) -> HubManifest:
    """Fetch one split of a dataset and describe its utterances; both are cached on disk by `datasets`.

    Durations and rates come from the audio headers. Rows whose header cannot be read are logged and left out. An id
    is the dataset's own where these are unique, else the stem of the file name where these are, else
    `<split>-<row number>`.

    Args:
        name: dataset of the Hub, or a local folder in any layout that `datasets.load_dataset` reads.
        config: configuration of the dataset; None for its only one.
        split: such as "train", or a slice such as "train[:100]".
        audio_column: which column is the audio; None takes the only one of that type.
        text_column: which column is the text; None takes the first of `COLUMNS` that is there.

    Returns:
        The utterances in the dataset's order.

    Raises:
        ValueError: the dataset cannot be reached or found, has no such config, split or column, or no usable row.
    """
    source = _source(name, config, split)
    clips = _load(name, config, split, source)
    columns = _columns(clips.features, source, audio_column, text_column)
    clips = clips.cast_column(columns["audio"], EncodedAudio(decode=False)).select_columns(sorted(columns.values()))
    described = clips.map(
        _describe,
        with_indices=True,
        remove_columns=clips.column_names,
        features=datasets.Features(DESCRIPTION),
        fn_kwargs={"columns": columns, "class_names": _class_names(clips.features), "split": split, "version": VERSION},
        desc=f"audio headers of {source}",
    )
    usable = _without_problems(described["problem"][:], described["number"][:], source)
    keys = next(field for field in ("id", "stem", "number") if _are_unique(described[field][:]))
    rows = described.select_columns([keys, *(field for field in FIELDS if field not in ("id", "audio"))])
    rows = rows.rename_columns({keys: "id"})
    audio = clips.select_columns([columns["audio"]]).rename_columns({columns["audio"]: "audio"})
    rows = datasets.concatenate_datasets([rows, audio], axis=1).select_columns(list(FIELDS))
    return HubManifest(Path(source), rows if len(usable) == len(rows) else rows.select(usable))


class HubStream(IterableDataset):
    """Utterances of a split, read as they come and never stored; made by `stream_hub_dataset`.

    With a seed, the files are shuffled in each epoch and then the utterances inside blocks of `shuffle_buffer`: unlike
    the shuffle buffer of `datasets`, a block can be restored exactly, by reading it again. In the workers of a
    DataLoader each reads its own files; `state_dict` then stands in the worker and not in the main process.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        source: str,
        columns: dict[str, str],
        *,
        seed: int | None,
        shuffle_buffer: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.dataset, self.source, self.columns = dataset, source, columns
        self.class_names = _class_names(dataset.features)
        feature = dataset.features.get(columns.get("id", ""))
        self.has_text_ids = getattr(feature, "dtype", None) in ("string", "large_string")
        self.seed, self.shuffle_buffer, self.rank, self.world_size = seed, shuffle_buffer, rank, world_size
        self._reported: set[str] = set()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch and begin it; the same (seed, epoch) always gives the same order."""
        self.epoch, self._state, self._start = epoch, BEGINNING, BEGINNING

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands on this rank: numbers alone, no audio."""
        return {"epoch": self.epoch, **self._state, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration give the rest of the epoch; at most `shuffle_buffer` utterances are read again.

        Raises:
            ValueError: the state is of another dataset, seed, block size, rank or number of processes.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(
                    f"the stream's state has {name}={state.get(name)}, this run has {value}; resume with the dataset, "
                    "seed, shuffle_buffer and number of processes of the run that saved it"
                )
        self.set_epoch(state["epoch"])
        self._state = self._start = {name: state[name] for name in BEGINNING}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start, self._start = self._start, BEGINNING  # a second iteration is a whole epoch again
        if self.seed is not None:
            # datasets shuffles the files by its epoch number alone, so the seed goes in there
            self.dataset.set_epoch(int(np.random.default_rng((self.seed, self.epoch)).integers(1, 2**31)))
        self.dataset.load_state_dict(start["files"])
        block, first, files = start["block"], start["position"], start["files"]
        rows = iter(self.dataset)
        while held := list(islice(rows, self.shuffle_buffer)):
            order = np.arange(len(held))
            if self.seed is not None:
                order = np.random.default_rng((self.seed, self.epoch, block)).permutation(len(held))
            for position in range(first, len(held)):
                self._state = {"block": block, "position": position + 1, "files": files}
                utterance = self._utterance(held[order[position]])
                if utterance is not None:
                    yield utterance
            block, first, files = block + 1, 0, self.dataset.state_dict()

    def _utterance(self, row: dict[str, Any]) -> dict[str, Any] | None:
        row[self.columns["audio"]] = audio = _local(row[self.columns["audio"]])
        described = _describe(row, 0, columns=self.columns, class_names=self.class_names, split="", version=0)
        key = described["id"] if self.has_text_ids else None
        key = key or described["stem"] or f"audio-{hashlib.blake2b(audio['bytes'] or b'', digest_size=8).hexdigest()}"
        if described["problem"]:
            if key not in self._reported:
                self._reported.add(key)
                logger.warning("%s: utterance %r is left out: %s", self.source, key, described["problem"])
            return None
        return {**{field: described.get(field) for field in FIELDS}, "id": key, "audio": _encoded(audio)}

    def _identity(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("source", "seed", "shuffle_buffer", "rank", "world_size")}


def stream_hub_dataset(
    name: str,
    config: str | None,
    split: str,
    *,
    audio_column: str | None = None,
    text_column: str | None = None,
    seed: int | None = None,
    shuffle_buffer: int = 256,
    rank: int = 0,
    world_size: int = 1,
) -> HubStream:
    """The utterances of `read_hub_dataset` one by one, without fetching the split first.

    That ids are unique cannot be known before the end and is not checked: an id is the dataset's own where it is text,
    else the stem of the file name, else a hash of the audio. Numbers are not taken, since in FLEURS and Speech
    Commands they count sentences.

    Args:
        name, config, audio_column, text_column: see `read_hub_dataset`.
        split: such as "train"; slices cannot be streamed.
        seed: of the shuffling, 0 or more; None keeps the dataset's order.
        shuffle_buffer: encoded clips held in memory and mixed, 1 or more.
        rank: index of this process.
        world_size: number of processes. Each reads its own files where their number divides by `world_size`; else
            each reads all files and keeps its share of the utterances.

    Raises:
        ValueError: as `read_hub_dataset`, or an argument is out of its range.
    """
    if shuffle_buffer < 1:
        raise ValueError(f"shuffle_buffer must be 1 or more, got {shuffle_buffer}; 1 mixes the files alone")
    if seed is not None and seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}; None keeps the dataset's order")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be 0 to world_size - 1, got rank={rank} with world_size={world_size}")
    source = _source(name, config, split)
    try:
        dataset = datasets.load_dataset(name, config, split=split, streaming=True)
    except _LOADING_ERRORS as error:
        raise _unreadable(source, error) from error
    columns = _columns(dataset.features, source, audio_column, text_column)
    dataset = dataset.cast(_encoded_features(dataset.features)).select_columns(sorted(columns.values()))
    if world_size > 1:
        dataset = split_dataset_by_node(dataset, rank, world_size)
    return HubStream(
        dataset, source, columns, seed=seed, shuffle_buffer=shuffle_buffer, rank=rank, world_size=world_size
    )


_LOADING_ERRORS = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)


def _load(name: str, config: str | None, split: str, source: str) -> datasets.Dataset:
    try:
        try:
            return datasets.load_dataset(name, config, split=split)
        except datasets.exceptions.DatasetGenerationError as error:
            if not isinstance(error.__cause__, (ImportError, RuntimeError)):
                raise
            # torchcodec is missing or finds no ffmpeg: audio folders and tars must be told not to ask for it
            streams = datasets.load_dataset(name, config, streaming=True)
            features = _encoded_features(next(iter(streams.values())).features)
            return datasets.load_dataset(name, config, split=split, features=features)
    except _LOADING_ERRORS as error:
        raise _unreadable(source, error) from error


def _unreadable(source: str, error: Exception) -> ValueError:
    reason = f"{error} ({error.__cause__})" if isinstance(error, datasets.exceptions.DatasetBuildError) else str(error)
    if isinstance(error, ConnectionError):
        advice = "connect to the network (HF_HUB_OFFLINE must not be set) to fetch it once, or name a local folder"
    elif isinstance(error, FileNotFoundError):
        advice = "check the name on https://huggingface.co/datasets, log in with `hf auth login` if it is gated"
    elif "scripts are no longer supported" in reason:
        advice = "take a copy of it in parquet, or download the corpus and use its script of data_prep/"
    else:
        advice = "a source is hub:NAME[:CONFIG]:SPLIT"
    return ValueError(f"{source} cannot be read: {reason.strip()}; {advice}")


def _source(name: str, config: str | None, split: str) -> str:
    return ":".join(["hub", name, *([config] if config else []), split])


def _columns(
    features: datasets.Features | None, source: str, audio_column: str | None, text_column: str | None
) -> dict[str, str]:
    """Which column holds which field of the manifest."""
    features = features or datasets.Features()
    known = ", ".join(features) or "not declared"
    audio = [column for column, feature in features.items() if isinstance(feature, datasets.Audio)]
    if audio_column is None and len(audio) != 1:
        raise ValueError(
            f"{source} has {len(audio)} audio columns, {audio}, where one is needed (columns: {known}); "
            f"{'name it in audio_column' if audio else 'a column must be of the type datasets.Audio'}"
        )
    columns = {"audio": audio_column or audio[0]}
    for field, names in COLUMNS.items():
        present = [column for column in names if column in features]
        columns.update({field: present[0]} if present else {})
    columns.update({"text": text_column} if text_column else {})
    for field, column, possible in (("audio", audio_column, audio), ("text", text_column, list(features))):
        if column and column not in possible:
            raise ValueError(f"{source} has no {field} column {column!r}; its columns are {known}")
    return columns


def _encoded_features(features: datasets.Features) -> datasets.Features:
    audio = [column for column, feature in features.items() if isinstance(feature, datasets.Audio)]
    return datasets.Features({**features, **{column: EncodedAudio(decode=False) for column in audio}})


def _class_names(features: datasets.Features) -> dict[str, list[str]]:
    return {column: feature.names for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)}


def _describe(
    row: dict[str, Any],
    index: int,
    *,
    columns: dict[str, str],
    class_names: dict[str, list[str]],
    split: str,
    version: int,
) -> dict[str, Any]:
    """A row as the fields of a manifest but its audio, with the other possible ids and what is wrong with the audio."""
    described: dict[str, Any] = dict.fromkeys(DESCRIPTION)
    for field, column in columns.items():
        if field != "audio":
            described[field] = _text(row[column], class_names.get(column))
    if described["language"]:
        # as in the manifests of data_prep: en_us and en-US are en, Mandarin is zh
        language = re.split("[-_]", described["language"])[0]
        described["language"] = "zh" if language == "cmn" else language
    audio = row[columns["audio"]] or {"bytes": None, "path": None}
    described["stem"] = Path(audio["path"]).stem if audio["path"] else None
    described["number"] = f"{split}-{index:06d}"
    try:
        if not _encoded(audio):
            raise ValueError("it has no audio")
        info = soundfile.info(audio["path"] if audio["bytes"] is None else io.BytesIO(audio["bytes"]))
        if not 0 < info.frames < 2**62:  # libsndfile's number for an unknown length is 2**63 - 1
            raise ValueError(f"its header promises {info.frames} samples")
        described["duration_seconds"], described["sample_rate_hz"] = info.frames / info.samplerate, info.samplerate
    except (OSError, RuntimeError, ValueError) as error:  # soundfile's errors are RuntimeErrors
        described["problem"] = str(error)
    return described


def _text(value: Any, names: list[str] | None) -> str | None:
    if value is None or (names and not 0 <= value < len(names)):
        return None
    return names[value] if names else str(value)


def _encoded(audio: dict[str, Any]) -> bytes | str | None:
    return audio["path"] if audio["bytes"] is None else audio["bytes"]


def _local(audio: dict[str, Any] | None) -> dict[str, Any]:
    """The same audio as bytes where its path is not on this machine."""
    audio = audio or {"bytes": None, "path": None}
    if audio["bytes"] is None and audio["path"] and "://" in audio["path"]:
        with fsspec.open(audio["path"], "rb") as file:
            return {"bytes": file.read(), "path": audio["path"].split("::")[0]}
    return audio


def _are_unique(keys: list[str | None]) -> bool:
    return all(keys) and len(set(keys)) == len(keys)


def _without_problems(problems: list[str | None], numbers: list[str], source: str) -> list[int]:
    """Positions of the rows that can be used; the others are logged."""
    bad = [index for index, problem in enumerate(problems) if problem]
    shown = "; ".join(f"{numbers[index]}: {problems[index]}" for index in bad[:MAX_PROBLEMS_SHOWN])
    if len(bad) == len(problems):
        raise ValueError(f"{source} has {len(problems)} rows and no usable audio in them ({shown or 'it is empty'})")
    if bad:
        logger.warning("%d of %d rows of %s are left out: %s", len(bad), len(problems), source, shown)
    return [index for index, problem in enumerate(problems) if not problem]
