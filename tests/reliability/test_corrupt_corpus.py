"""A corpus of which 5 % is spoilt trains to the end and names each bad file once; above the limit it does not begin."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from processes import fork_server, label_arguments, labels_by_id, train_arguments, write_corpus

from speechkd.files import read_jsonl

pytestmark = pytest.mark.reliability

NUM_CLIPS = 120
RATE_HZ = 16_000


def encoded(samples: np.ndarray, **options: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE_HZ, **{"format": "WAV", **options})
    return file.getvalue()


def truncated_flac(content: bytes) -> bytes:
    samples, _ = soundfile.read(io.BytesIO(content))
    flac = encoded(samples, format="FLAC")
    return flac[: len(flac) * 6 // 10]


def nan_samples(content: bytes) -> bytes:
    samples, _ = soundfile.read(io.BytesIO(content))
    samples[100:120] = np.nan
    return encoded(samples, subtype="FLOAT")


def wrong_header_length(content: bytes) -> bytes:
    size = int.from_bytes(content[40:44], "little")  # of the data chunk
    return content[:40] + (10 * size).to_bytes(4, "little") + content[44:]


SPOIL: dict[str, Callable[[bytes], bytes]] = {
    "truncated FLAC": truncated_flac,
    "zero bytes": lambda content: b"",
    "text renamed to .wav": lambda content: b"This is not audio.\n" * 500,
    "NaN samples": nan_samples,
    "0 samples": lambda content: encoded(np.zeros(0)),
    "wrong header length": wrong_header_length,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """Manifest of 120 clips, and the six spoilt ones by id."""
    folder = tmp_path_factory.mktemp("corrupt")
    manifest = write_corpus(folder, NUM_CLIPS)
    bad = {}
    for index, spoil in zip(range(7, NUM_CLIPS, 20), SPOIL.values(), strict=True):
        path = folder / f"audio/{index:03d}.wav"
        path.write_bytes(spoil(path.read_bytes()))
        bad[f"tone-{index:03d}"] = path
    return manifest, bad


def assert_named_once(bad: dict[str, Path], skipped: Path, output: str) -> None:
    rows = read_jsonl(skipped)
    assert {row["id"]: row["audio"] for row in rows} == {key: str(path) for key, path in bad.items()}
    assert len(rows) == len(bad)
    assert {key: output.count(f"'{key}'") for key in bad} == dict.fromkeys(bad, 1), output
    assert {path: output.count(str(path)) for path in bad.values()} == dict.fromkeys(bad.values(), 1), output


def test_training_on_the_manifests_text_passes_over_bad_files_and_names_each_once(tiny_teacher, corpus, tmp_path):
    manifest, bad = corpus
    argv = train_arguments(tiny_teacher, manifest, tmp_path / "run", None, **{"data.max_skipped_fraction": 0.05})
    code, output = fork_server().run("train", argv, tmp_path / "log")
    assert code == 0, output
    assert (tmp_path / "run/student/model.safetensors").exists()
    assert_named_once(bad, tmp_path / "run/skipped.jsonl", output)


def test_labelling_and_training_on_the_labels_pass_over_bad_files(tiny_teacher, corpus, tmp_path):
    manifest, bad = corpus
    labels_dir = tmp_path / "labels"
    argv = label_arguments(tiny_teacher, manifest, labels_dir / "train", "--max-skipped-fraction", "0.05")
    code, output = fork_server().run("label", argv, tmp_path / "label.log")
    assert code == 0, output
    assert_named_once(bad, labels_dir / "train/skipped.jsonl", output)
    assert len(labels_by_id(labels_dir / "train")) == NUM_CLIPS - len(bad)
    argv = train_arguments(tiny_teacher, manifest, tmp_path / "run", labels_dir, **{"data.max_skipped_fraction": 0.05})
    code, output = fork_server().run("train", argv, tmp_path / "train.log")
    assert code == 0, output
    assert (tmp_path / "run/student/model.safetensors").exists()


def test_too_many_bad_files_stop_the_run_before_training(tiny_teacher, corpus, tmp_path):
    manifest, bad = corpus
    run_dir = tmp_path / "run"
    argv = train_arguments(tiny_teacher, manifest, run_dir, None, **{"data.max_skipped_fraction": 0.01})
    code, output = fork_server().run("train", argv, tmp_path / "log")
    assert code == 2 and "Traceback" not in output, output
    assert f"error: 6 of 120 clips (5.0 %) were skipped and are named in {run_dir / 'skipped.jsonl'}" in output
    assert "max_skipped_fraction" in output
    assert_named_once(bad, run_dir / "skipped.jsonl", output)
    assert not (run_dir / "train_log.jsonl").exists() and not list(run_dir.glob("checkpoint-*"))


def test_too_many_bad_files_end_labelling_with_the_good_ones_kept(tiny_teacher, corpus, tmp_path):
    manifest, bad = corpus
    labels_dir = tmp_path / "labels"
    code, output = fork_server().run("label", label_arguments(tiny_teacher, manifest, labels_dir), tmp_path / "log")
    assert code == 2 and "Traceback" not in output, output
    assert f"error: 6 of 120 clips (5.0 %) were skipped and are named in {labels_dir / 'skipped.jsonl'}" in output
    assert_named_once(bad, labels_dir / "skipped.jsonl", output)
    assert len(labels_by_id(labels_dir)) == NUM_CLIPS - len(bad)
