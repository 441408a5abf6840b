"""Label sets of a Whisper student: what comes before, windows of clips, and what is drawn in each epoch."""

from pathlib import Path

import numpy as np
import pytest
from conftest import TOKENS, write_tone
from transformers import WhisperTokenizer

from speechkd.bundled import bundled_path
from speechkd.data.collate import LabelDraws, has_timestamps
from speechkd.data.manifest import Manifest, read_manifest, write_manifest
from speechkd.data.packing import pack_manifest, timestamp_token
from speechkd.data.whisper import (
    WhisperTrainSet,
    collate_whisper,
    pseudo_labelled_set,
    reference_set,
    segments_before,
)
from speechkd.labels.filters import FilterConfig
from speechkd.labels.scores import compression_ratio
from speechkd.labels.teacher_cache import LabelStore, create_store

SECONDS = 9.0  # three fit into a window
EVERY_LABEL = FilterConfig(min_mean_logprob=None, max_compression_ratio=None, max_repeated_5grams=None)
WORDS = ["one cup", "two cups", "three cups", "four cups", "five cups", "six cups", "seven cups"]


@pytest.fixture(scope="module")
def tokenizer() -> WhisperTokenizer:
    return WhisperTokenizer.from_pretrained(bundled_path("whisper-base"))


@pytest.fixture
def corpus(tmp_path: Path) -> Manifest:
    """Seven clips of 9 s with texts: windows of three, three and one."""
    rows = []
    for index, text in enumerate(WORDS):
        write_tone(tmp_path / f"{index}.wav", SECONDS, pitch_hz=200 + 50 * index)
        row = {"id": f"c{index}", "audio": f"{index}.wav", "duration_seconds": SECONDS, "sample_rate_hz": 16_000}
        rows.append({**row, "text": text})
    write_manifest(tmp_path / "corpus.jsonl", rows)
    return read_manifest(tmp_path / "corpus.jsonl")


def label_row(key: str, seconds: float, token_ids: list[int], text: str, **more) -> dict:
    row = {"id": key, "duration_seconds": seconds, "token_ids": token_ids, "text": text, "mean_logprob": -0.1}
    return {**row, "compression_ratio": compression_ratio(text), "no_speech_prob": 0.0, "finished": True, **more}


def write_store(folder: Path, rows: list[dict], **decoding) -> LabelStore:
    header = {"teacher": {"name": "teacher", "weights_sha256": "0" * 64}, "targets": ["text"]}
    header["decoding"] = {"language": "en", "task": "transcribe", "max_new_tokens": 64, **decoding}
    store = create_store(folder, header)
    store.write_shard(rows, {})
    return store


def packed_store(corpus: Manifest, tokenizer, folder: Path, texts: list[str], **decoding) -> LabelStore:
    """Labels of windows, as a teacher with timestamps that hears these texts gives them."""
    words, rows = dict(zip(corpus.ids, texts, strict=True)), []
    for pack in pack_manifest(corpus):
        label = list(TOKENS.prefix[:3])
        for part in pack["parts"]:
            times = (part["start_seconds"], part["start_seconds"] + part["duration_seconds"])
            start, end = (timestamp_token(seconds, TOKENS) for seconds in times)
            label += [start, *tokenizer.encode(" " + words[part["id"]], add_special_tokens=False), end]
        text = " ".join(words[part["id"]] for part in pack["parts"])
        where = {"previous_id": pack["previous_id"], "parts": pack["parts"]}
        rows.append(label_row(pack["id"], pack["duration_seconds"], [*label, TOKENS.end_of_text], text, **where))
    return write_store(folder, rows, pack=True, timestamps=True, **decoding)


def labelled(corpus: Manifest, store: LabelStore, tokenizer, filters: FilterConfig = EVERY_LABEL, **more):
    settings = {"cached_encoder_states": False, "max_skipped_fraction": 0.01, **more}
    return pseudo_labelled_set(corpus, store, filters, tokenizer=tokenizer, tokens=TOKENS, **settings)


def drawn(train_set: WhisperTrainSet, draws: LabelDraws, epoch: int = 0) -> list[tuple[bool, bool]]:
    """Whether each item's label has timestamps and a prompt, taken one by one through the collator."""
    train_set.set_epoch(epoch)
    found = []
    for index in range(len(train_set)):
        inputs = collate_whisper([train_set[index]], TOKENS, draws)["decoder_input_ids"][0].tolist()
        found.append((has_timestamps(inputs, TOKENS), inputs[0] == TOKENS.start_of_prev))
    return found


def test_windows_of_the_label_store_are_trained_on_with_the_label_before_as_prompt(corpus, tokenizer, tmp_path):
    store = packed_store(corpus, tokenizer, tmp_path / "labels", WORDS)
    train_set, report = labelled(corpus, store, tokenizer)
    packed = pack_manifest(corpus)
    assert train_set.manifest.ids == packed.ids and report["kept"]["kept_utterances"] == 3
    assert train_set.previous == [None, 0, 1]
    item = train_set[1]
    assert item["id"] == packed.ids[1] and len(item["waveform"]) == 3 * SECONDS * 16_000
    assert item["previous_ids"] == train_set.token_ids[0]
    assert train_set.label_lengths.tolist() == [len(label) for label in train_set.token_ids]


def test_probabilities_0_and_1_never_and_always_act(corpus, tokenizer, tmp_path):
    store = packed_store(corpus, tokenizer, tmp_path / "labels", WORDS)
    train_set, _ = labelled(corpus, store, tokenizer)
    for epoch in range(3):
        assert drawn(train_set, LabelDraws(), epoch) == [(False, False)] * 3
        always = LabelDraws(timestamp_probability=1.0, previous_text_probability=1.0)
        assert drawn(train_set, always, epoch) == [(True, False), (True, True), (True, True)]
    text = collate_whisper([train_set[2]], TOKENS, LabelDraws(previous_text_probability=1.0))["decoder_input_ids"]
    assert not has_timestamps(text[0].tolist(), TOKENS)  # gone from the prompt too
    stamped = collate_whisper([train_set[2]], TOKENS, always)["decoder_input_ids"][0].tolist()
    prompt = stamped[: stamped.index(TOKENS.start_of_transcript)]
    assert has_timestamps(prompt, TOKENS) and TOKENS.end_of_text not in prompt


def test_draws_follow_from_seed_epoch_and_utterance_and_not_from_the_batch(corpus, tokenizer, tmp_path):
    store = packed_store(corpus, tokenizer, tmp_path / "labels", WORDS)
    train_set, _ = labelled(corpus, store, tokenizer)
    draws = LabelDraws(timestamp_probability=0.5, previous_text_probability=0.5, seed=3)
    epochs = [drawn(train_set, draws, epoch) for epoch in range(100)]
    assert [drawn(train_set, draws, epoch) for epoch in range(5)] == epochs[:5]
    assert [drawn(train_set, LabelDraws(0.5, 0.5, seed=4), epoch) for epoch in range(5)] != epochs[:5]
    shares = np.array(epochs)[:, 1:].mean(axis=(0, 1))
    assert shares == pytest.approx([0.5, 0.5], abs=0.12)  # three deviations of 200 draws
    train_set.set_epoch(7)
    batch = collate_whisper([train_set[index] for index in (2, 0, 1)], TOKENS, draws)
    prompted = [row[0] == TOKENS.start_of_prev for row in batch["decoder_input_ids"].tolist()]
    assert prompted == [epochs[7][index][1] for index in (2, 0, 1)]


def test_labels_without_timestamps_stay_as_they_are(corpus, tokenizer, tmp_path):
    rows = [
        label_row(key, SECONDS, [*TOKENS.prefix, 400 + index, TOKENS.end_of_text], "cup")
        for index, key in enumerate(corpus.ids)
    ]
    train_set, _ = labelled(corpus, write_store(tmp_path / "labels", rows), tokenizer)
    batch = collate_whisper([train_set[3]], TOKENS, LabelDraws(1.0, 1.0))
    assert batch["decoder_input_ids"].tolist() == [[*TOKENS.prefix, 403]]


def test_a_window_whose_label_is_dropped_is_no_prompt(corpus, tokenizer, tmp_path):
    store = packed_store(corpus, tokenizer, tmp_path / "labels", [*WORDS[:3], "SIX", "SIX", "SIX", WORDS[6]])
    train_set, report = labelled(corpus, store, tokenizer)
    assert report["dropped"] == {"drop_all_caps": 1}
    assert train_set.manifest.ids == [pack_manifest(corpus).ids[index] for index in (0, 2)]
    assert train_set.previous == [None, None]


def test_references_judge_single_clips_and_what_passes_is_packed_anew(corpus, tokenizer, tmp_path):
    heard = [*WORDS[:4], "thank you for watching", *WORDS[5:]]
    store = packed_store(corpus, tokenizer, tmp_path / "labels", heard)
    train_set, report = labelled(corpus, store, tokenizer, FilterConfig(max_wer=10.0))
    assert report["dropped"] == {"max_wer": 1} and report["kept"]["kept_utterances"] == 6
    parts = [[part["id"] for part in pack["parts"]] for pack in train_set.manifest]
    assert parts == [["c0", "c1", "c2"], ["c3", "c5", "c6"]]
    text = tokenizer.decode(train_set.token_ids[1], skip_special_tokens=True)
    assert text == " four cups six cups seven cups"
    assert len(train_set[1]["waveform"]) == 3 * SECONDS * 16_000
    second = 3 + train_set.token_ids[1][3:].index(timestamp_token(SECONDS, TOKENS))
    assert train_set.token_ids[1][3] == timestamp_token(0, TOKENS) and second > 3


def test_references_that_would_judge_whole_windows_are_refused(corpus, tokenizer, tmp_path):
    store = packed_store(corpus, tokenizer, tmp_path / "labels", WORDS)
    filters = FilterConfig(max_wer=10.0)
    with pytest.raises(ValueError, match=r"are of windows.*decoding.timestamps=true.*or set filters.max_wer=null"):
        labelled(corpus, store, tokenizer, filters, cached_encoder_states=True)
    store.header["decoding"].pop("timestamps")
    with pytest.raises(ValueError, match="a WER or CER filter judges single utterances: label with timestamps"):
        labelled(corpus, store, tokenizer, filters)


def test_filters_that_keep_nothing_say_what_each_keeps(corpus, tokenizer, tmp_path):
    store = packed_store(corpus, tokenizer, tmp_path / "labels", WORDS)
    with pytest.raises(ValueError, match="keep none of 3 labels; alone, min_mean_logprob keeps 0, max_compression"):
        labelled(corpus, store, tokenizer, FilterConfig(min_mean_logprob=-0.05))


def test_clips_that_no_window_has_count_as_missing(corpus, tokenizer, tmp_path):
    store = packed_store(corpus.select(range(6)), tokenizer, tmp_path / "labels", WORDS[:6])
    with pytest.raises(ValueError, match="1 of 7 utterances have no label in .*max_skipped_fraction=0.01; finish"):
        labelled(corpus, store, tokenizer)
    train_set, _ = labelled(corpus, store, tokenizer, max_skipped_fraction=0.2)
    assert len(train_set) == 2


def test_texts_of_clips_become_windows_with_timestamps_between_them(corpus, tokenizer, tmp_path):
    train_set = reference_set(
        corpus, tokenizer, TOKENS, output_dir=str(tmp_path / "run"), max_skipped_fraction=0.0, pack=True
    )
    assert train_set.manifest.ids == pack_manifest(corpus).ids and train_set.previous == [None, 0, 1]
    stamps = [token for token in train_set.token_ids[0] if token > TOKENS.no_timestamps]
    assert stamps == [timestamp_token(seconds, TOKENS) for seconds in (0, 9, 9, 18, 18, 27)]
    assert tokenizer.decode(train_set.token_ids[0], skip_special_tokens=True) == " one cup two cups three cups"


def test_the_segment_before_is_of_the_same_recording_and_speaker(tmp_path):
    write_tone(tmp_path / "a.wav", 6.0)
    write_tone(tmp_path / "b.wav", 6.0)
    segments = [
        ("a", 4, "x"),
        ("a", 0, "x"),
        ("b", 0, "x"),
        ("b", 1, "y"),
        ("b", 2, "x"),
        ("a", 5, "x"),
        ("b", None, "x"),
    ]
    rows = []
    for index, (audio, offset, speaker) in enumerate(segments):
        row = {"id": f"s{index}", "audio": f"{audio}.wav", "duration_seconds": 1.0, "sample_rate_hz": 16_000}
        rows.append({**row, "offset_seconds": None if offset is None else float(offset), "speaker": speaker})
    write_manifest(tmp_path / "segments.jsonl", rows)
    manifest = read_manifest(tmp_path / "segments.jsonl")
    assert segments_before(manifest) == ["s1", None, None, None, None, "s0", None]
