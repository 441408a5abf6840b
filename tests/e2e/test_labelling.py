"""Labels of the real teacher on real orders, against transformers' own decoding."""

import numpy as np
import pytest
import soundfile
import torch
from barista import prepare_barista
from conftest import ROOT
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.loader import clip_batches
from speechkd.data.manifest import read_manifest, write_manifest
from speechkd.labels.decoding import DecodingConfig
from speechkd.labels.labeller import Labeller
from speechkd.labels.pseudo_label import label_manifest
from speechkd.labels.verify import verify_store
from speechkd.teachers import load_whisper

DATA = ROOT.parent / "shared/data"
TEACHER = "bundled:whisper-base"
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not DATA.is_dir(), reason="no real recordings beside the checkout")]


class NoTimestamps(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, 50364:] = -torch.inf
        return scores


@pytest.mark.parametrize("timestamps", [False, True])
def test_labels_of_orders_are_the_tokens_of_transformers_generate(timestamps, tmp_path):
    prepare_barista(DATA / "barista", tmp_path)
    manifest = read_manifest(tmp_path / "test.jsonl")
    labeller = Labeller(TEACHER, load_whisper(TEACHER), DecodingConfig(batch_size=6, timestamps=timestamps))
    batch = next(clip_batches(manifest, range(6), sample_rate_hz=SAMPLE_RATE_HZ, batch_size=6))
    rows, _ = labeller.label(batch)
    model, end = labeller.model, labeller.tokens.end_of_text
    with torch.no_grad():
        states = model.model.encoder(labeller.log_mel(batch.waveforms)).last_hidden_state
    sequences = model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        logits_processor=LogitsProcessorList([] if timestamps else [NoTimestamps()]),
        max_new_tokens=224,
        language="en",
        return_timestamps=timestamps,
        force_unique_generate_call=True,
        return_dict_in_generate=True,
    ).sequences.tolist()
    assert [row["token_ids"] for row in rows] == [ids[: ids.index(end) + 1] for ids in sequences]
    assert len({len(row["token_ids"]) for row in rows}) > 2


def test_a_silent_clip_is_stored_and_counted(tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(3 * SAMPLE_RATE_HZ, dtype=np.float32), SAMPLE_RATE_HZ)
    row = {"id": "s", "audio": "silence.wav", "duration_seconds": 3.0, "sample_rate_hz": SAMPLE_RATE_HZ}
    write_manifest(tmp_path / "m.jsonl", [row])
    store = label_manifest(TEACHER, tmp_path / "m.jsonl", tmp_path / "labels", decoding=DecodingConfig())
    (label,) = store.rows()
    report = verify_store(store.folder, tmp_path / "m.jsonl", TEACHER)
    assert report["problems"] == []
    assert report["num_probably_silent"] == (label["text"] == "" and label["no_speech_prob"] > 0.6)
