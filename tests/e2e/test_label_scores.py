"""Label-free scores of real labels: what the teacher misheard, it was unsure of."""

import pytest
import soundfile
from conftest import ROOT

from speechkd.data.manifest import write_manifest
from speechkd.labels.filters import FilterConfig, ScoreFilter, apply_filters
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.labels.score_labels import score_labels
from speechkd.labels.score_store import read_scores
from speechkd.labels.teacher_cache import LabelStore

CLIPS = ROOT.parent / "shared/data/barista/data/speech/clean"
pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not CLIPS.is_dir(), reason="no real recordings beside the checkout")]

WELL_HEARD = [
    "835af760-91d5-4833-9f68-f333d23c6b09",  # I'd like a cappuccino with lots of whole milk.
    "6647fb7f-670c-475b-bcae-5765f3e58ccf",  # I'd like a light roast coffee.
    "726706ea-814c-4773-9845-1b50dac21210",  # Make me a triple shot iced coffee with whole milk.
    "4f0b1081-0a28-4ca8-a051-1c7bed01944d",  # Can I have a 20-ounce iced coffee with a little bit of sweetener?
]
MISHEARD = [
    "61b6baf5-cad2-4f60-965c-8cbbfb73389a",  # Brue à Smolarte.
    "d99dde73-1f93-4190-bc09-0de51c54d71c",  # Can I get a NATO-stice coffee?
    "a234f42c-39a6-4f14-b991-a93284018431",  # Make me an ice-mocker with sweetener and soy milk.
    "3e81883a-3a0d-4820-855d-93221fb2dba9",  # I'd like light roast chicken with a little bit of brown sugar.
]


def test_the_better_half_by_entropy_or_confidence_is_what_the_teacher_heard_well(tmp_path):
    rows = []
    for key in MISHEARD + WELL_HEARD:
        info = soundfile.info(CLIPS / f"{key}.flac")
        row = {"id": key, "audio": str(CLIPS / f"{key}.flac"), "duration_seconds": info.frames / info.samplerate}
        rows.append(row | {"sample_rate_hz": info.samplerate})
    manifest, labels, out = tmp_path / "orders.jsonl", tmp_path / "labels", tmp_path / "scores"
    write_manifest(manifest, rows)
    label_manifest("bundled:whisper-base", manifest, labels, decoding=DecodingConfig(batch_size=8, max_new_tokens=40))
    score_labels(labels, manifest, out, ["mean_entropy", "confidence"], plot=True)
    scored = read_scores(out / "scores.jsonl", list(LabelStore(labels).rows()))
    for name in ("mean_entropy", "confidence"):
        kept, _ = apply_filters(scored, FilterConfig(scores=[ScoreFilter(name=name, keep_fraction=0.5)]))
        assert sorted(row["id"] for row in kept) == sorted(WELL_HEARD)
        assert (out / f"{name}.png").exists()
