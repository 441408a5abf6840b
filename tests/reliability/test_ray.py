"""Labelling on a local Ray cluster of two workers."""

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from conftest import write_tone

from speechkd.data.manifest import write_manifest
from speechkd.labels import pseudo_label
from speechkd.labels.decoder_state_labels import decoder_states_key
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.labels.teacher_cache import LabelStore
from speechkd.labels.topk_records import topk_key

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.reliability

DECODING = DecodingConfig(batch_size=2, max_new_tokens=40)
NUM_CLIPS = 48


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ray-corpus")
    rows = []
    for index in range(NUM_CLIPS):
        seconds = 1.0 + index / 100
        write_tone(folder / f"{index}.wav", seconds, pitch_hz=200 + 10 * index)
        rows.append({"id": f"{index}", "audio": f"{index}.wav", "duration_seconds": seconds, "sample_rate_hz": 16_000})
    write_manifest(folder / "m.jsonl", rows)
    return folder / "m.jsonl"


@pytest.fixture(scope="module")
def local_labels(tiny_teacher, manifest, tmp_path_factory) -> dict[str, list[int]]:
    store = label_manifest(tiny_teacher, manifest, tmp_path_factory.mktemp("local") / "labels", decoding=DECODING)
    return token_ids(store)


def token_ids(store: LabelStore) -> dict[str, list[int]]:
    """Labels by id; each id must be there once."""
    rows = list(store.rows())
    assert max(Counter(row["id"] for row in rows).values()) == 1
    return {row["id"]: row["token_ids"] for row in rows}


def actor_processes() -> list[psutil.Process]:
    """Workers of this test's cluster that hold a labelling actor."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "MapBatches(_Actor)" in " ".join(process.cmdline())
    ]


def test_a_killed_worker_loses_no_clip_and_changes_no_label(
    cluster, tiny_teacher, manifest, local_labels, tmp_path, monkeypatch
):
    monkeypatch.setattr(pseudo_label, "SHARD_UTTERANCES", 4)
    labels = tmp_path / "labels"
    killed: list[int] = []
    num_labelled: list[int] = []

    def kill_one_after_the_first_shard() -> None:
        deadline = time.monotonic() + 120
        while not list(labels.glob("shard-*.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.02)
        num_labelled.append(sum(1 for _ in LabelStore(labels).rows()))
        killed.append(actor_processes()[0].pid)
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one_after_the_first_shard)
    killer.start()
    store = label_manifest(tiny_teacher, manifest, labels, decoding=DECODING, engine="ray", num_actors=2)
    killer.join()
    assert num_labelled[0] < NUM_CLIPS / 2  # it was killed in the middle
    assert killed and not psutil.pid_exists(killed[0])
    assert token_ids(store) == local_labels


def test_each_engine_goes_on_with_what_the_other_began(cluster, tiny_teacher, manifest, local_labels, tmp_path):
    targets = ("text", "encoder_states", "topk", "decoder_states")
    local = label_manifest(tiny_teacher, manifest, tmp_path / "local", decoding=DECODING, targets=targets)
    shards = sorted((tmp_path / "local").glob("shard-*"))
    names = [key for name in local_labels for key in (name, topk_key(name), decoder_states_key(name))]
    expected = {key: local.array(key).clone() for key in names}
    for path in shards:
        rows = path.read_text().splitlines(keepends=True) if path.suffix == ".jsonl" else []
        if rows:  # as if it had been stopped after 20 clips
            path.write_text("".join(rows[:20]))
    mended = label_manifest(
        tiny_teacher, manifest, tmp_path / "local", decoding=DECODING, targets=targets, engine="ray", num_actors=1
    )
    assert token_ids(mended) == local_labels
    for key, array in expected.items():
        found = mended.array(key)
        assert found.shape == array.shape and found.dtype == array.dtype
        if array.is_floating_point():  # records of top-k targets are bytes, where a rounding cannot be told apart
            torch.testing.assert_close(found, array, rtol=1e-2, atol=1e-3)
    (sorted((tmp_path / "local").glob("shard-*.jsonl"))[-1]).unlink()  # the part that Ray made
    again = label_manifest(tiny_teacher, manifest, tmp_path / "local", decoding=DECODING, targets=targets)
    assert token_ids(again) == local_labels


def test_packs_have_the_same_rows_with_both_engines(cluster, tiny_teacher, manifest, tmp_path):
    rows = []
    for engine in ("local", "ray"):
        num_actors = 2 if engine == "ray" else None
        options = {"decoding": DECODING, "pack": True, "engine": engine, "num_actors": num_actors}
        store = label_manifest(tiny_teacher, manifest, tmp_path / engine, **options)
        rows.append({row["id"]: (row["previous_id"], row["parts"], row["token_ids"]) for row in store.rows()})
    assert rows[0] == rows[1] and len(rows[0]) == 3


def test_what_is_wrong_with_the_input_is_said_without_rays_wrapping(cluster, tiny_teacher, manifest, tmp_path):
    with pytest.raises(ValueError, match=r"^teacher .* does not know the language 'eng'; near ones are en \(english\)"):
        label_manifest(
            tiny_teacher,
            manifest,
            tmp_path / "labels",
            decoding=DecodingConfig(language="eng"),
            engine="ray",
            num_actors=1,
        )
    assert not (tmp_path / "labels/header.json").exists()
    with pytest.raises(ValueError, match="num_actors must be 1 to 2, the cluster's processors, got 3"):
        label_manifest(tiny_teacher, manifest, tmp_path / "labels", decoding=DECODING, engine="ray", num_actors=3)
