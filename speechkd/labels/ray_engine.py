"""Labelling by many workers on one or several machines, through Ray Data.

The manifest and its audio lie where all machines see them. Workers get paths, decode audio themselves and return rows;
only the process that was started writes to the label store, so a worker that dies leaves nothing half done there.
"""

import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from transformers import WhisperForConditionalGeneration

from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.loader import clip_batches
from speechkd.data.manifest import Manifest
from speechkd.labels.decoder_state_labels import decoder_states_key
from speechkd.labels.decoding import DecodingConfig
from speechkd.labels.labeller import Labeller, Target
from speechkd.labels.pseudo_label import ShardWriter, store_header
from speechkd.labels.teacher_cache import LabelStore
from speechkd.labels.topk_records import topk_key
from speechkd.preemption import Preempted, sigterm_requests
from speechkd.teachers import load_whisper, teacher_identity

logger = logging.getLogger(__name__)

BLOCK_CLIPS = 64  # what a worker takes at a time, and what is done again when it dies
PORTION_CLIPS = 100_000  # how many paths Ray holds at a time; workers load the teacher once a portion
PASSED_ON = ("HF_HUB_OFFLINE", "HF_HOME", "XDG_CACHE_HOME")  # where teachers are looked for


class RayWorkers:
    """Workers of a Ray cluster: the one that is running, or else one of this machine's processors.

    Args:
        model_name: Hub id, folder or `bundled:<name>`, found by every machine.
        decoding: language and limits.
        num_actors: workers; None takes one for each GPU of the cluster, or else one for each machine.

    Raises:
        ValueError: Ray is not installed, or there are more workers than GPUs or processors.
    """

    def __init__(self, model_name: str, decoding: DecodingConfig, num_actors: int | None = None) -> None:
        self.model_name, self.decoding = model_name, decoding
        self.ray = _start_ray()
        resources = self.ray.cluster_resources()
        num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        machines = [node for node in self.ray.nodes() if node["Alive"]]
        self.num_actors = num_actors or num_gpus or len(machines)
        limit, unit = (num_gpus, "GPUs") if num_gpus else (num_cpus, "processors")
        if not 1 <= self.num_actors <= limit:
            raise ValueError(f"num_actors must be 1 to {limit}, the cluster's {unit}, got {self.num_actors}")
        self.device_type = "cuda" if num_gpus else "cpu"
        self.num_threads = max(1, num_cpus // self.num_actors)
        self.options: dict[str, Any] = {
            "num_gpus": 1 if num_gpus else 0,
            "num_cpus": 1 if num_gpus else self.num_threads,
            "runtime_env": {"env_vars": {name: os.environ[name] for name in PASSED_ON if name in os.environ}},
        }

    def header(self, targets: tuple[Target, ...], pack: bool) -> dict[str, Any]:
        """Header of the label store, made by a worker: on a GPU the teacher may have another dtype than here.

        Raises:
            ValueError: the teacher cannot be loaded, or takes no such language.
        """
        arguments = (self.model_name, targets, self.decoding, pack, self.device_type)
        try:
            return self.ray.get(self.ray.remote(_header).options(**self.options).remote(*arguments))
        except self.ray.exceptions.RayError as error:
            raise _own_error(error) from error

    def label(self, manifest: Manifest, pending: list[int], store: LabelStore, max_skipped_fraction: float) -> None:
        """Label these positions of a manifest; workers that die are replaced, and their block is done again.

        Args:
            manifest: JSONL manifest or packs of one.
            pending: positions, longest first.
            store: gets the rows.
            max_skipped_fraction: share of clips that may be undecodable, 0 to 1.

        Raises:
            ValueError: the audio is no file, or a worker has other weights than the store's teacher.
            AudioError: too many clips cannot be decoded.
            Preempted: SIGTERM came; what workers had returned is stored.
        """
        logger.info("%d workers on %s", self.num_actors, self.device_type)
        ids = manifest.ids
        to_come = {ids[position] for position in pending}
        with sigterm_requests() as termination, ShardWriter(store, manifest, pending, max_skipped_fraction) as writer:
            for block in self._blocks(manifest, pending, store.header):
                results = [json.loads(result) for result in block["result"]]
                # a block of a dead worker may have arrived just before it died
                rows = [result for result in results if "reason" not in result and result["id"] in to_come]
                to_come -= {result["id"] for result in results}
                wanted = {row["id"] for row in rows}
                arrays = {
                    key: array
                    for result, data in zip(results, block["arrays"], strict=True)
                    if result["id"] in wanted
                    for key, array in load(data).items()
                }
                skipped = [result for result in results if "reason" in result]
                writer.add(rows, arrays, skipped, write_now=termination.received)
                if termination.received:
                    raise Preempted(
                        f"stopped by SIGTERM; what is labelled is in {store.folder}, the same command resumes"
                    )

    def _blocks(self, manifest: Manifest, pending: list[int], header: dict[str, Any]) -> Iterator[dict[str, Any]]:
        data = self.ray.data
        context = data.DataContext.get_current()
        context.enable_progress_bars = False  # ours counts hours of audio
        block_clips = max(BLOCK_CLIPS, self.decoding.clips_per_batch(torch.device(self.device_type)))
        for first in range(0, len(pending), PORTION_CLIPS):
            positions = pending[first : first + PORTION_CLIPS]
            # small corpora are shared out as well
            num_blocks = max(-(-len(positions) // block_clips), min(len(positions), 4 * self.num_actors))
            items = [{"utterance": _as_json(manifest[position])} for position in positions]
            try:
                yield from (
                    data.from_items(items, override_num_blocks=num_blocks)
                    .map_batches(
                        _Actor,
                        batch_size=None,
                        batch_format="numpy",
                        compute=data.ActorPoolStrategy(size=min(self.num_actors, num_blocks)),
                        fn_constructor_args=(
                            self.model_name,
                            self.decoding,
                            header,
                            self.device_type,
                            self.num_threads,
                        ),
                        **self.options,
                    )
                    .iter_batches(batch_size=None, batch_format="numpy")
                )
            except self.ray.exceptions.RayError as error:
                raise _own_error(error) from error


class _Actor:
    """One worker: loads the teacher once and labels blocks of paths."""

    def __init__(
        self, model_name: str, decoding: DecodingConfig, header: dict[str, Any], device_type: str, num_threads: int
    ) -> None:
        torch.set_num_threads(num_threads)
        self.model = load_whisper(model_name, device=device_type)
        self.labeller = Labeller(model_name, self.model, decoding)
        self.model_name, self.header, self.is_checked = model_name, header, False

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        if not self.is_checked:  # here, because Ray tries again for a long time when a worker cannot be made
            _check_weights(self.model_name, self.model, self.header["teacher"])
            self.is_checked = True
        targets = self.header["targets"]
        utterances: Any = [json.loads(utterance) for utterance in block["utterance"]]
        columns: dict[str, list[Any]] = {"result": [], "arrays": []}
        for batch in clip_batches(
            utterances,
            range(len(utterances)),
            sample_rate_hz=SAMPLE_RATE_HZ,
            batch_size=self.labeller.num_clips,
            max_seconds=self.labeller.window_seconds,
            num_workers=self.labeller.decoding.num_workers,
            device=self.model.device,
        ):
            rows, arrays = self.labeller.label(batch, targets)
            for result in [*rows, *batch.skipped]:
                keys = (result["id"], topk_key(result["id"]), decoder_states_key(result["id"]))
                columns["result"].append(json.dumps(result))
                columns["arrays"].append(save({key: arrays[key] for key in keys if key in arrays}))
        return columns


def _header(
    model_name: str, targets: tuple[Target, ...], decoding: DecodingConfig, pack: bool, device_type: str
) -> dict[str, Any]:
    model = load_whisper(model_name, device=device_type)
    Labeller(model_name, model, decoding)  # refuses a wrong language before anything is written
    return store_header(model_name, model, targets, decoding, pack)


def _check_weights(model_name: str, model: WhisperForConditionalGeneration, known: dict[str, Any]) -> None:
    """Refuse a machine on which the same name stands for another teacher."""
    teacher = teacher_identity(model_name, model)
    if teacher["weights_sha256"] != known["weights_sha256"]:
        raise ValueError(
            f"teacher {model_name!r} on {os.uname().nodename} has weights {teacher['weights_sha256'][:12]}, but the "
            f"labels come from {known['name']} (weights {known['weights_sha256'][:12]}); give all machines the same "
            "model and the same kind of device"
        )


def _as_json(utterance: dict[str, Any]) -> str:
    parts = utterance.get("parts") or [utterance]
    if not all(isinstance(part["audio"], str) for part in parts):
        raise ValueError(
            f"utterance {utterance['id']!r} comes from a Hub dataset that carries its audio itself, but workers on Ray "
            "read audio from files; use --engine local, or write the corpus as a manifest first"
        )
    return json.dumps(utterance)


def _start_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(
            'engine "ray" needs Ray, which is not installed; run: pip install "speechkd[ray]", or use --engine local'
        ) from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level=logging.WARNING)
    return ray


def _own_error(error: BaseException) -> BaseException:
    """What a worker raised itself, out of Ray's wrapping; the given error where there is no such thing."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, ValueError) and type(inner).__module__ != "ray.exceptions":
            cause = getattr(inner, "cause", None)
            return cause if isinstance(cause, ValueError) else inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    return error
