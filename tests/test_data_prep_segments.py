import gzip
import hashlib
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import libriheavy
import numpy as np
import pytest
import soundfile
from libriheavy import prepare_libriheavy

from speechkd.data.audio import load_utterance
from speechkd.data.manifest import read_manifest

BOOK = "small/100/sea_fairies_0812_librivox_64kb_mp3"
TEXT = 'The little girl. "Why?" she asked.'


def make_recording(librilight: Path, seconds: float = 10.0) -> np.ndarray:
    """One chapter of noise in Libri-Light's layout; its samples as stored, (samples,), float32."""
    path = librilight / BOOK / "01_baum_sea_fairies_64kb.flac"
    path.parent.mkdir(parents=True)
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, round(16_000 * seconds))
    soundfile.write(path, samples, 16_000)
    return soundfile.read(path, dtype="float32")[0]


def make_cut(index: int, start: Any, duration: Any, text: str = TEXT) -> dict[str, Any]:
    """A cut as Libriheavy publishes it."""
    recording = f"{BOOK}/01_baum_sea_fairies_64kb"
    return {
        "id": f"{recording}_{index}",
        "start": start,
        "duration": duration,
        "channel": 0,
        "supervisions": [
            {
                "id": f"{recording}_{index}",
                "recording_id": recording,
                "start": 0,
                "duration": duration,
                "channel": 0,
                "language": "English",
                "speaker": "100",
                "custom": {"texts": [text, "THE LITTLE GIRL WHY SHE ASKED"], "begin_byte": 4993, "end_byte": 5120},
            }
        ],
        "recording": {
            "id": recording,
            "sources": [{"type": "file", "channels": [0], "source": f"download/librilight/{recording}.flac"}],
            "sampling_rate": 16000,
            "num_samples": 160000,
            "duration": 10.0,
            "channel_ids": [0],
        },
        "custom": {"text_path": "download/librilight_text/output_text_small_cleaned/Sea Fairies/text.txt"},
        "type": "MonoCut",
    }


def write_cuts(path: Path, cuts: list[dict[str, Any]]) -> None:
    content = "".join(json.dumps(cut) + "\n" for cut in cuts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("name", ["libriheavy_cuts_small.jsonl.gz", "libriheavy_cuts_small.jsonl"])
@pytest.mark.parametrize("folder", ["download/librilight", "librilight", "."])
def test_an_utterance_is_exactly_its_part_of_the_long_recording(tmp_path, name, folder):
    samples = make_recording(tmp_path / "corpus" / folder)
    write_cuts(tmp_path / "corpus" / name, [make_cut(0, 2.5, 1.25), make_cut(1, 8.0, 2.0), make_cut(2, 0, 3.0)])
    assert prepare_libriheavy(tmp_path / "corpus", tmp_path / "out") == {"small": 3, "skipped": 0}
    rows = list(read_manifest(tmp_path / "out/small.jsonl"))
    assert [(row["offset_seconds"], row["duration_seconds"]) for row in rows] == [(2.5, 1.25), (8.0, 2.0), (0.0, 3.0)]
    for row, part in zip(rows, (samples[40_000:60_000], samples[128_000:], samples[:48_000]), strict=True):
        assert np.array_equal(load_utterance(row, 16_000).numpy(), part)
    assert rows[0]["text"] == TEXT
    assert (rows[0]["speaker"], rows[0]["language"], rows[0]["sample_rate_hz"]) == ("100", "en", 16_000)


def test_a_text_of_the_supervision_itself_comes_before_the_custom_ones(tmp_path):
    make_recording(tmp_path / "corpus")
    cut = make_cut(0, 1.0, 2.0)
    cut["supervisions"][0]["text"] = " THE LITTLE GIRL "
    write_cuts(tmp_path / "corpus/my_cuts.jsonl", [cut])
    assert prepare_libriheavy(tmp_path / "corpus", tmp_path / "out")["my_cuts"] == 1
    assert read_manifest(tmp_path / "out/my_cuts.jsonl")[0]["text"] == "THE LITTLE GIRL"


def changed(cut: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {key: value for key, value in (cut | fields).items() if value is not None}


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        (make_cut(7, 8.5, 3.0), "goes from 8.50 s to 11.50 s, but .* lasts 10.00 s"),
        (make_cut(7, 10.0, 0.05), "goes from 10.00 s to 10.05 s, but .* lasts 10.00 s"),
        (make_cut(7, -1.0, 2.0), "goes from -1.00 s to 1.00 s"),
        (make_cut(7, 1.0, 0.0), "goes from 1.00 s to 1.00 s"),
        (make_cut(7, float("nan"), 1.0), "goes from nan s"),
        (make_cut(7, 10**400, 1.0), "not a lhotse cut .*OverflowError"),
        (make_cut(7, "soon", 1.0), "could not convert string to float: 'soon'"),
        (make_cut(7, 1.0, 1.0, text="  "), "has no text"),
        (make_cut(7, 1.0, 1.0, text="half \ud83d"), "surrogates not allowed"),
        (changed(make_cut(7, 1.0, 1.0), supervisions=[]), "has 0 supervisions where one is needed"),
        (
            changed(make_cut(7, 1.0, 1.0), recording=None),
            r"not a lhotse cut with one source \(KeyError\('recording'\)\)",
        ),
        (changed(make_cut(7, 1.0, 1.0), supervisions=[None]), "not a lhotse cut"),
        (
            changed(make_cut(7, 1.0, 1.0), recording={"sources": [{"source": "download/librilight/small/9/b/c.flac"}]}),
            "recording download/librilight/small/9/b/c.flac does not exist in",
        ),
        (
            changed(make_cut(7, 1.0, 1.0), recording={"sources": [{"source": "librilight/../broken.flac"}]}),
            r"recording librilight/../broken.flac does not exist in",
        ),
        (
            changed(make_cut(7, 1.0, 1.0), recording={"sources": [{"source": "broken.flac"}]}),
            "broken.flac: cannot be opened",
        ),
    ],
)
def test_a_cut_that_cannot_be_used_is_named_with_its_reason_and_the_others_are_kept(tmp_path, cut, reason):
    make_recording(tmp_path / "corpus/librilight")
    (tmp_path / "corpus/broken.flac").write_bytes(b"broken")
    write_cuts(tmp_path / "corpus/libriheavy_cuts_small.jsonl.gz", [make_cut(0, 1.0, 2.0), cut, make_cut(2, 3.0, 2.0)])
    assert prepare_libriheavy(tmp_path / "corpus", tmp_path / "out") == {"small": 2, "skipped": 1}
    skipped = json.loads((tmp_path / "out/skipped.jsonl").read_text())
    assert skipped["id"] == f"{BOOK}/01_baum_sea_fairies_64kb_7"
    assert re.search(reason, skipped["reason"])


def test_lines_that_are_no_cuts_are_named_by_file_and_line(tmp_path):
    make_recording(tmp_path / "corpus/librilight")
    path = tmp_path / "corpus/libriheavy_cuts_dev.jsonl"
    write_cuts(path, [make_cut(0, 1.0, 2.0)])
    path.write_bytes(path.read_bytes() + b'{"id": \n[1, 2]\n\xff\xfe{}\nnull\n')
    assert prepare_libriheavy(tmp_path / "corpus", tmp_path / "out") == {"dev": 1, "skipped": 4}
    ids = [json.loads(line)["id"] for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert ids == [f"libriheavy_cuts_dev.jsonl:{number}" for number in (2, 3, 4, 5)]


def test_a_truncated_file_of_cuts_is_an_error_and_leaves_no_manifest(tmp_path):
    make_recording(tmp_path / "corpus/librilight")
    path = tmp_path / "corpus/libriheavy_cuts_small.jsonl.gz"
    write_cuts(path, [make_cut(index, 1.0, 2.0) for index in range(200)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="libriheavy_cuts_small.jsonl.gz is truncated or damaged .*; fetch it again"):
        prepare_libriheavy(tmp_path / "corpus", tmp_path / "out")
    assert not (tmp_path / "out/small.jsonl").exists()


def test_without_cuts_or_with_unusable_ones_only_the_message_says_what_to_do(tmp_path):
    make_recording(tmp_path / "corpus/librilight")
    with pytest.raises(ValueError, match=r"no \*cuts\*.jsonl or \*cuts\*.jsonl.gz in .*; it needs libriheavy_cuts_"):
        prepare_libriheavy(tmp_path / "corpus", tmp_path / "out")
    write_cuts(tmp_path / "corpus/libriheavy_cuts_small.jsonl.gz", [make_cut(0, 90.0, 2.0)])
    with pytest.raises(ValueError, match="no utterance could be used, 1 items were skipped"):
        prepare_libriheavy(tmp_path / "corpus", tmp_path / "out")
    assert "goes from 90.00 s" in (tmp_path / "out/skipped.jsonl").read_text()
    with pytest.raises(ValueError, match="holds the cuts, which manifests could replace; choose another"):
        prepare_libriheavy(tmp_path / "corpus", tmp_path / "corpus")


def test_libriheavy_download_fetches_cuts_and_audio_once(tmp_path, monkeypatch, capsys):
    server, corpus = tmp_path / "server", tmp_path / "corpus"
    make_recording(tmp_path / "made")
    server.mkdir()
    with tarfile.open(server / "small.tar", "w") as archive:
        archive.add(tmp_path / "made/small", "small")
    write_cuts(server / "libriheavy_cuts_small.jsonl.gz", [make_cut(0, 1.0, 2.0)])
    monkeypatch.setattr(libriheavy, "AUDIO_URL", server.as_uri())
    monkeypatch.setattr(libriheavy, "CUTS_URL", server.as_uri())
    command = ["--download", "--json", "--corpus-dir", str(corpus), "--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as end:
        libriheavy.main(command)
    assert end.value.code == 2 and "libriheavy_cuts_small.jsonl.gz has SHA256" in capsys.readouterr().err
    cuts_sha256 = hashlib.sha256((server / "libriheavy_cuts_small.jsonl.gz").read_bytes()).hexdigest()
    monkeypatch.setitem(libriheavy.CUTS_SHA256, "small", cuts_sha256)
    monkeypatch.setitem(libriheavy.AUDIO_MD5, "small", hashlib.md5((server / "small.tar").read_bytes()).hexdigest())
    libriheavy.main(command)
    (server / "small.tar").unlink()
    libriheavy.main(command)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [{"small": 1, "skipped": 0}] * 2
    assert {path.name for path in corpus.iterdir()} == {"librilight", "libriheavy_cuts_small.jsonl.gz"}
