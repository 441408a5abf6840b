import sys

import pytest
import torch
from conftest import write_tone

from speechkd.data.features import SAMPLE_RATE_HZ
from speechkd.data.loader import ClipBatch, clip_batches
from speechkd.data.manifest import read_manifest, write_manifest
from speechkd.data.packing import pack_manifest
from speechkd.labels import pseudo_label
from speechkd.labels.decoding import DecodingConfig, decoding_tokens
from speechkd.labels.filters import FilterConfig, drop_reasons
from speechkd.labels.labeller import Labeller
from speechkd.labels.pseudo_label import label_manifest
from speechkd.teachers import load_processor, load_whisper

DECODING = DecodingConfig(batch_size=6, max_new_tokens=6)


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher):
    return load_processor(tiny_teacher).tokenizer


@pytest.fixture(scope="module")
def model(tiny_teacher):
    return load_whisper(tiny_teacher)


@pytest.fixture
def batch(tone_manifest) -> ClipBatch:
    manifest = read_manifest(tone_manifest)
    return next(clip_batches(manifest, range(6), sample_rate_hz=SAMPLE_RATE_HZ, batch_size=6))


def refuse_more_than(num_clips: int, labeller: Labeller) -> list[int]:
    """Run out of memory above a number of clips; returns the batch sizes that were tried."""
    seen = []

    def check(module, args) -> None:
        seen.append(len(args[0]))
        if len(args[0]) > num_clips:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    labeller.log_mel.register_forward_pre_hook(check)
    return seen


def test_a_batch_that_does_not_fit_is_labelled_in_parts_and_so_are_later_ones(tiny_teacher, model, batch):
    expected, arrays = Labeller(tiny_teacher, model, DECODING).label(batch, ["encoder_states"])
    labeller = Labeller(tiny_teacher, load_whisper(tiny_teacher), DECODING)
    seen = refuse_more_than(2, labeller)
    rows, parts = labeller.label(batch, ["encoder_states"])
    assert [(row["id"], row["token_ids"]) for row in rows] == [(row["id"], row["token_ids"]) for row in expected]
    assert parts.keys() == arrays.keys() and all(torch.allclose(parts[key], arrays[key], atol=1e-3) for key in parts)
    assert seen == [1, 6, 4, 2, 2, 2]  # one to warm up; six and four do not fit
    seen.clear()
    labeller.label(batch)
    assert seen == [2, 2, 2]


def test_a_clip_that_does_not_fit_alone_is_named(tiny_teacher, batch):
    labeller = Labeller(tiny_teacher, load_whisper(tiny_teacher), DECODING)
    refuse_more_than(0, labeller)
    with pytest.raises(ValueError, match="clip 'tone-0' does not even fit alone into the memory of cpu; end other"):
        labeller.label(batch)


def test_an_automatic_batch_size_depends_on_the_device():
    decoding = DecodingConfig(batch_size="auto")
    assert decoding.clips_per_batch(torch.device("cpu")) == 16
    assert decoding.clips_per_batch(torch.device("cuda:1")) == 256
    assert DecodingConfig(batch_size=3).clips_per_batch(torch.device("cuda")) == 3


def test_an_english_teacher_takes_no_language_and_does_not_translate(tiny_teacher, tokenizer):
    model = load_whisper(tiny_teacher)
    model.generation_config.is_multilingual = False
    for decoding, asked in (
        (DecodingConfig(language="de"), "language 'de'"),
        (DecodingConfig(language=None, task="translate"), "task 'translate'"),
    ):
        with pytest.raises(ValueError, match=f"'a.en' knows English only and takes no {asked}; pass --language none"):
            decoding_tokens("a.en", model, tokenizer, decoding)
    tokens = decoding_tokens("a.en", model, tokenizer, DecodingConfig(language=None))
    assert tokens.prefix == (50258, 50363)


@pytest.mark.parametrize(
    ("language", "near"),
    [
        ("german", "de (german)"),
        ("de-AT", "de (german)"),
        ("castilian", "es (spanish)"),
        ("swahilli", "sw (swahili)"),
        ("xx", "en (english)"),
    ],
)
def test_a_language_that_the_teacher_lacks_is_refused_with_those_that_are_near(model, tokenizer, language, near):
    with pytest.raises(ValueError) as caught:
        decoding_tokens("t", model, tokenizer, DecodingConfig(language=language))
    told, _, known = str(caught.value).partition(". It knows 99: ")
    assert told.startswith(f"teacher 't' does not know the language {language!r}; near ones are ") and near in told
    assert len(known.split(", ")) == 99


def test_a_wrong_language_leaves_nothing_behind(tiny_teacher, tone_manifest, tmp_path):
    labels = tmp_path / "labels"
    for language, message in ((None, "is multilingual and must be told the language"), ("eng", "near ones are en")):
        with pytest.raises(ValueError, match=message):
            label_manifest(tiny_teacher, tone_manifest, labels, decoding=DecodingConfig(language=language))
    assert not (labels / "header.json").exists()


def test_clips_without_speech_keep_an_empty_label_that_filters_drop(tiny_teacher, tmp_path):
    model = load_whisper(tiny_teacher)
    with torch.no_grad():  # the end of the text has by far the highest logit
        model.model.decoder.layer_norm.bias += 1.0
        model.proj_out.weight[50257] += 5.0
    model.generation_config.begin_suppress_tokens = None
    model.save_pretrained(tmp_path / "silent")
    load_processor(tiny_teacher).save_pretrained(tmp_path / "silent")
    write_tone(tmp_path / "a.wav")
    row = {"id": "a", "audio": "a.wav", "duration_seconds": 1.0, "sample_rate_hz": 16_000, "text": ""}
    write_manifest(tmp_path / "m.jsonl", [row])
    store = label_manifest(str(tmp_path / "silent"), tmp_path / "m.jsonl", tmp_path / "labels", decoding=DECODING)
    (row,) = store.rows()
    assert row["text"] == "" and row["finished"] and row["token_ids"] == [50258, 50259, 50359, 50363, 50257]
    assert drop_reasons([row | {"reference": "two words"}], FilterConfig(max_wer=50)) == ["max_wer"]


def test_packs_keep_the_pack_before_them_across_shards_and_resumed_runs(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(pseudo_label, "SHARD_UTTERANCES", 1)
    rows = []
    for index in range(9):  # three packs of three clips
        write_tone(tmp_path / f"{index}.wav", 9.0, pitch_hz=200 + 10 * index)
        rows.append({"id": f"{index}", "audio": f"{index}.wav", "duration_seconds": 9.0, "sample_rate_hz": 16_000})
    write_manifest(tmp_path / "m.jsonl", rows)
    decoding = DecodingConfig(batch_size=1, max_new_tokens=4)
    store = label_manifest(tiny_teacher, tmp_path / "m.jsonl", tmp_path / "labels", decoding=decoding, pack=True)
    expected = {row["id"]: row for row in store.rows()}
    packs = pack_manifest(read_manifest(tmp_path / "m.jsonl"))
    assert [expected[key]["previous_id"] for key in packs.ids] == [None, *packs.ids[:2]]
    (store.row_files()[1]).unlink()
    label_manifest(tiny_teacher, tmp_path / "m.jsonl", tmp_path / "labels", decoding=decoding, pack=True)
    again = {row["id"]: row for row in store.rows()}
    for key, row in expected.items():
        same = ("previous_id", "parts", "token_ids")
        assert [again[key][name] for name in same] == [row[name] for name in same]


def test_a_missing_ray_is_named_with_its_extra(tiny_teacher, tone_manifest, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'run: pip install "speechkd\[ray\]", or use --engine local'):
        label_manifest(tiny_teacher, tone_manifest, tmp_path / "labels", decoding=DECODING, engine="ray")
    with pytest.raises(ValueError, match="num_actors=2 is for engine ray"):
        label_manifest(tiny_teacher, tone_manifest, tmp_path / "labels", decoding=DECODING, num_actors=2)
