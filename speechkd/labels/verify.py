"""Label stores checked against their manifest, and parts of a corpus merged into one store."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from speechkd.data.hub import read_utterances
from speechkd.files import folder_lock, read_jsonl, write_jsonl
from speechkd.frame_encoders import load_frame_encoder
from speechkd.labels.decoder_state_labels import decoder_states_key, is_decoder_states
from speechkd.labels.mvq_codes import is_codes, mvq_key
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError, check_teacher, create_store
from speechkd.labels.topk_records import topk_key
from speechkd.teachers import load_whisper, teacher_identity

logger = logging.getLogger(__name__)

MAX_SHOWN = 5  # ids that a message names; all are counted
NO_SPEECH_THRESHOLD = 0.6  # of openai/whisper's transcribe
SECONDS_TOLERANCE = 1e-3


def verify_store(
    labels_dir: str | Path, manifest_path: str | Path | None = None, teacher_name: str | None = None
) -> dict[str, Any]:
    """Read a whole label store and say what is wrong with it; nothing is written.

    Args:
        labels_dir: the store.
        manifest_path: what should be labelled; None leaves out what needs it.
        teacher_name: who should have made the labels; None believes the store. It is loaded on a CPU in the dtype
            that the store names, as the weights are compared in it.

    Returns:
        `output_dir`; `teacher`, its name in the store; `num_rows`, `num_ids`, and `problems`: messages, one a kind.
        Then counts of what may be right: `num_skipped` (clips named in `skipped.jsonl`), `num_empty` (labels without
        text), `num_unfinished` (stopped by the length limit), `num_probably_silent` (empty, and a `no_speech_prob`
        above 0.6).

    Raises:
        LabelStoreError: there is no store.
        ManifestError: the manifest cannot be read.
    """
    store = LabelStore(labels_dir)
    found = _read_shards(store)
    problems = found.problems
    seconds, counts = found.seconds, Counter(found.ids)
    report = {
        "output_dir": str(store.folder),
        "teacher": store.header["teacher"]["name"],
        "num_rows": len(found.ids),
        "num_ids": len(counts),
    }
    twice = [key for key, count in counts.items() if count > 1 and key not in found.in_repeated_shards]
    _complain(problems, twice, "have more than one row; remove all but one of each")
    _complain(problems, found.lost_previous, "follow a pack that has no row, and can have no previous-text prompt")
    skipped = {row["id"] for row in read_jsonl(store.folder / "skipped.jsonl")} - set(seconds)
    if manifest_path is not None:
        manifest = read_utterances(manifest_path)
        expected = dict(zip(manifest.ids, manifest.durations_seconds.tolist(), strict=True))
        missing = [key for key in expected if key not in seconds and key not in skipped]
        _complain(problems, missing, f"of {manifest_path} have no row; run the same `speechkd label` again")
        unknown = [key for key in seconds if key not in expected]
        _complain(problems, unknown, f"have rows, but are not in {manifest_path}; it may be of another corpus or split")
        other = [
            key
            for key, duration in expected.items()
            if key in seconds and abs(seconds[key] - duration) > SECONDS_TOLERANCE
        ]
        _complain(problems, other, "last longer or shorter in the manifest; the labels belong to other audio")
    if teacher_name is not None:
        try:
            check_teacher(store, _identity_for(store, teacher_name))
        except LabelStoreError as error:
            problems.append(str(error))
    return {**report, "problems": problems, "num_skipped": len(skipped), **found.remarks}


def _identity_for(store: LabelStore, teacher_name: str) -> dict[str, Any]:
    if "mvq" in store.header:
        return load_frame_encoder(teacher_name).identity
    dtype = getattr(torch, store.header["decoding"]["dtype"])
    return teacher_identity(teacher_name, load_whisper(teacher_name, dtype=dtype))


class _Found:
    """What the shards of a store hold."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.ids: list[str] = []
        self.seconds: dict[str, float] = {}  # by utterance; of packs, those of the parts
        self.in_repeated_shards: set[str] = set()
        self.lost_previous: list[str] = []
        self.remarks = dict.fromkeys(("num_empty", "num_unfinished", "num_probably_silent"), 0)


def _read_shards(store: LabelStore) -> _Found:
    found = _Found()
    bad_arrays: list[str] = []
    digests: dict[str, str] = {}
    previous: dict[str, str] = {}
    has_text = "mvq" not in store.header
    for path in tqdm(store.row_files(), desc="verify", unit="shard"):
        rows, line_problems = _parse(path, ("text", "finished", "no_speech_prob") if has_text else ("num_frames",))
        found.problems += line_problems
        keys = [row["id"] for row in rows]
        # by ids and not by bytes: a shard labelled again differs in its compute_seconds
        digest = hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()
        if keys and digest in digests:
            found.problems.append(f"{path.name} has the same ids as {digests[digest]}; remove one of them")
            found.in_repeated_shards.update(keys)
        digests.setdefault(digest, path.name)
        found.ids += keys
        for row in rows:
            found.seconds.update((part["id"], part["duration_seconds"]) for part in row.get("parts") or [row])
            if row.get("previous_id") is not None:
                previous[row["id"]] = row["previous_id"]
            if not has_text:
                continue
            is_empty = not row["text"].strip()
            found.remarks["num_empty"] += is_empty
            found.remarks["num_unfinished"] += not row["finished"]
            found.remarks["num_probably_silent"] += is_empty and row["no_speech_prob"] > NO_SPEECH_THRESHOLD
        bad_arrays += _bad_arrays(path.with_suffix(".safetensors"), rows, store.header)
    _complain(found.problems, bad_arrays, "have arrays that are missing, damaged or of another shape")
    known = set(found.ids)
    found.lost_previous = [key for key, before in previous.items() if before not in known]
    return found


def _parse(path: Path, fields: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    rows, problems = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
            missing = {"id", "duration_seconds", *fields} - row.keys()
            if missing:
                raise ValueError(f"lacks {', '.join(sorted(missing))}")
            rows.append(row)
        except (ValueError, AttributeError) as error:
            problems.append(f"{path}:{number}: no row of a label store ({error}); remove the shard and label again")
    return rows, problems


def _bad_arrays(path: Path, rows: list[dict[str, Any]], header: dict[str, Any]) -> list[str]:
    """Ids that lack an array which the header promises, or whose states are not what it says."""
    targets = set(header["targets"])
    if not {"encoder_states", "topk", "decoder_states", "mvq"} & targets:
        return []
    bad = []
    try:
        with safe_open(path, "pt") as file:
            known = set(file.keys())

            def read(name: str) -> torch.Tensor:
                return file.get_tensor(name) if name in known else torch.empty(0)

            for row in rows:
                key = row["id"]
                is_bad = "topk" in targets and topk_key(key) not in known
                if "mvq" in targets:
                    is_bad = not is_codes(read(mvq_key(key)), header, row["num_frames"])
                if "encoder_states" in targets and not is_bad:
                    array = read(key)
                    is_bad = list(array.shape) != header["encoder_states"]["shape"] or not array.isfinite().all()
                if "decoder_states" in targets and not is_bad:
                    array, num_tokens = read(decoder_states_key(key)), len(row.get("token_ids", ())) - 1
                    is_good = is_decoder_states(array, header["decoder_states"]["dim"], num_tokens)
                    is_bad = not is_good or not array.isfinite().all()
                if is_bad:
                    bad.append(key)
    except (OSError, SafetensorError):
        return [row["id"] for row in rows]
    return bad


def _complain(problems: list[str], keys: Sequence[str], what: str) -> None:
    if keys:
        shown = ", ".join(map(repr, keys[:MAX_SHOWN]))
        more = f" and {len(keys) - MAX_SHOWN} more" if len(keys) > MAX_SHOWN else ""
        problems.append(f"{len(keys)} utterance(s) {what}: {shown}{more}")


def merge_stores(stores: Iterable[str | Path], output_dir: str | Path) -> LabelStore:
    """Bring stores of parts of a corpus together, such as those of several machines; the parts stay as they are.

    An id with the same label in two stores is kept once. A merge that was killed goes on when it is called again.

    Args:
        stores: their folders.
        output_dir: the new store.

    Returns:
        The merged store.

    Raises:
        LabelStoreError: fewer than two stores, one that is listed twice or is the output, other teachers or settings,
            or an id with different labels. Nothing is written then.
    """
    folders, output_dir = [Path(folder) for folder in stores], Path(output_dir)
    resolved = [folder.resolve() for folder in folders]
    again = [str(folder) for folder, count in Counter(resolved).items() if count > 1]
    if len(folders) < 2 or again or output_dir.resolve() in resolved:
        raise LabelStoreError(
            f"merging takes two or more different stores and another output folder, got {', '.join(map(str, folders))} "
            f"into {output_dir}" + (f"; {', '.join(again)} is listed twice" if again else "")
        )
    parts = [LabelStore(folder) for folder in folders]
    for part in parts[1:]:
        _check_same_origin(parts[0], part)
    _check_same_labels(parts)
    header = {key: value for key, value in parts[0].header.items() if key != "format_version"}
    with folder_lock(output_dir):
        merged = create_store(output_dir, header)
        done = {row["id"] for row in merged.rows()}
        for path in tqdm([path for part in parts for path in part.row_files()], desc="merge", unit="shard"):
            rows = {row["id"]: row for row in read_jsonl(path) if row["id"] not in done}
            if rows:
                merged.write_shard(list(rows.values()), _arrays(path.with_suffix(".safetensors"), rows))
                done.update(rows)
        skipped = {row["id"]: row for part in parts for row in read_jsonl(part.folder / "skipped.jsonl")}
        skipped = {key: row for key, row in skipped.items() if key not in done}
        if skipped:
            write_jsonl(output_dir / "skipped.jsonl", list(skipped.values()))
    return merged


def _check_same_origin(first: LabelStore, other: LabelStore) -> None:
    check_teacher(first, other.header["teacher"])
    changed = [
        f"{key} is {first.header.get(key)} in {first.folder} and {other.header.get(key)} in {other.folder}"
        for key in sorted({*first.header, *other.header} - {"teacher"})
        if first.header.get(key) != other.header.get(key)
    ]
    if changed:
        raise LabelStoreError(f"stores made with other settings cannot be merged: {'; '.join(changed)}")


def _check_same_labels(parts: list[LabelStore]) -> None:
    """Refuse ids with different labels. Per id 16 bytes are held, not the label."""
    known: dict[str, tuple[bytes, int]] = {}
    conflicts: list[str] = []
    for number, part in enumerate(parts):
        for row in part.rows():
            label = json.dumps(
                [row.get("token_ids", row.get("num_frames")), round(row["duration_seconds"], 3)]
            ).encode()
            digest = hashlib.blake2b(label, digest_size=16).digest()
            before, before_number = known.setdefault(row["id"], (digest, number))
            if before != digest:
                conflicts.append(f"{row['id']!r} (in {parts[before_number].folder} and {part.folder})")
    if conflicts:
        raise LabelStoreError(
            f"{len(conflicts)} utterance(s) have different labels in two stores: {', '.join(conflicts[:MAX_SHOWN])}; "
            "remove the wrong store, or label these parts again"
        )


def _arrays(path: Path, rows: dict[str, dict[str, Any]]) -> dict[str, torch.Tensor]:
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        wanted = {*rows, *map(topk_key, rows), *map(decoder_states_key, rows), *map(mvq_key, rows)}
        return {key: file.get_tensor(key) for key in file.keys() if key in wanted}  # noqa: SIM118
