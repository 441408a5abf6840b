import functools
import tracemalloc

import pytest
import soundfile
import torch
from conftest import TOKENS, write_tone
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperTokenizer

from speechkd.bundled import bundled_path
from speechkd.data.audio import AudioError, load_audio
from speechkd.data.collate import collate_labels, prepend_prompt, strip_timestamps
from speechkd.data.loader import clip_batches
from speechkd.data.manifest import read_manifest, write_manifest
from speechkd.data.packing import (
    Segment,
    label_segments,
    load_pack,
    pack_label,
    pack_manifest,
    pack_utterances,
    split_label,
    timestamp_token,
)
from speechkd.data.whisper import WhisperTrainSet, collate_whisper
from speechkd.files import read_jsonl
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.labels.teacher_cache import LabelStoreError
from speechkd.models.whisper import greedy_decode
from speechkd.teachers import load_whisper

FIRST = TOKENS.no_timestamps + 1  # <|0.00|>


def utterances(*seconds, speakers=None, **fields):
    speakers = speakers or [None] * len(seconds)
    return [
        {
            "id": f"u{index}",
            "audio": f"{index}.wav",
            "duration_seconds": duration,
            "sample_rate_hz": 16_000,
            "speaker": speaker,
            "text": f"text {index}",
            **fields,
        }
        for index, (duration, speaker) in enumerate(zip(seconds, speakers, strict=True))
    ]


def part_ids(pack):
    return [part["id"] for part in pack["parts"]]


rows_of_speakers = st.lists(
    st.tuples(st.floats(0.05, 30.0), st.sampled_from(["a", "b", None])), min_size=1, max_size=60
).map(lambda rows: utterances(*(row[0] for row in rows), speakers=[row[1] for row in rows]))


@pytest.mark.parametrize(
    ("seconds", "speakers", "packed", "flags"),
    [
        ([10, 12, 9, 30, 1, 29], None, [22, 9, 30, 30], [0, 1, 1, 1]),
        ([10, 5, 5, 20], ["a", "a", "b", "b"], [15, 25], [0, 0]),
        ([35, 2], None, [35, 2], [0, 1]),
    ],
)
def test_packs_of_the_method_card(seconds, speakers, packed, flags):
    packs = list(pack_utterances(utterances(*seconds, speakers=speakers)))
    assert [pack["duration_seconds"] for pack in packs] == packed
    assert [int(pack["previous_id"] is not None) for pack in packs] == flags


@settings(deadline=None, max_examples=60)
@given(rows=rows_of_speakers)
def test_packing_keeps_every_utterance_once_in_order_and_speakers_apart(rows):
    packs = list(pack_utterances(rows))
    assert [key for pack in packs for key in part_ids(pack)] == [row["id"] for row in rows]
    speaker = {row["id"]: row["speaker"] for row in rows}
    for before, pack in zip([None, *packs], packs, strict=False):
        assert pack["duration_seconds"] <= 30
        assert {speaker[key] for key in part_ids(pack)} == {pack["speaker"]}
        starts = [part["start_seconds"] for part in pack["parts"]]
        lengths = [part["duration_seconds"] for part in pack["parts"]]
        assert starts == pytest.approx([sum(lengths[:index]) for index in range(len(lengths))], abs=1e-3)
        continues = before is not None and before["speaker"] == pack["speaker"]
        assert pack["previous_id"] == (before["id"] if continues else None)
        if continues:  # greedy: the first part had no room in the pack before
            assert before["duration_seconds"] + lengths[0] > 30 - 1e-4
    assert sum(len(pack["text"].split()) for pack in packs) == sum(len(row["text"].split()) for row in rows)
    assert len({pack["id"] for pack in packs}) == len(packs)


@pytest.mark.parametrize("seconds", [0.1, 0.3, 7.5])
def test_a_pack_of_exactly_30_s_is_filled_whatever_the_sum_of_floats(seconds):
    num_clips = round(30 / seconds)
    packs = list(pack_utterances(utterances(*[seconds] * (2 * num_clips))))
    assert [len(pack["parts"]) for pack in packs] == [num_clips, num_clips]
    assert [pack["duration_seconds"] for pack in packs] == [30.0, 30.0]


def test_a_stream_is_packed_in_constant_memory_and_as_it_comes():
    drawn = []

    def endless():
        while True:
            drawn.append(None)
            yield utterances(7.0)[0] | {"id": f"u{len(drawn)}", "audio": bytes(100_000)}

    packs = pack_utterances(endless())
    assert part_ids(next(packs)) == ["u1", "u2", "u3", "u4"]
    assert len(drawn) == 5
    tracemalloc.start()
    for _ in range(100):  # 40 MB of audio go by
        next(packs)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2_000_000


def test_languages_are_not_mixed():
    rows = utterances(2.0, 2.0, 2.0)
    for row, language in zip(rows, ["en", "en", "fr"], strict=True):
        row["language"] = language
    packs = list(pack_utterances(rows))
    assert [(pack["language"], len(pack["parts"]), pack["previous_id"]) for pack in packs] == [
        ("en", 2, None),
        ("fr", 1, None),
    ]


def test_bad_references_are_left_out_before_packing_and_interrupt_the_prompt():
    rows = utterances(10, 10, 10, 10, 25, 25)
    rows[1]["text"] = rows[4]["text"] = "wrong"
    packs = list(pack_utterances(rows, keep=lambda row: row["text"] != "wrong"))
    assert [part_ids(pack) for pack in packs] == [["u0", "u2", "u3"], ["u5"]]
    assert packs[0]["text"] == "text 0 text 2 text 3"
    assert packs[1]["previous_id"] is None  # u4 lies between


@pytest.mark.parametrize(
    ("files", "offsets", "continues"),
    [
        (["x.wav", "x.wav"], [0.0, 20.0], True),
        (["x.wav", "y.wav"], [0.0, 0.0], False),
        (["x.wav", "x.wav"], [20.0, 0.0], False),
        (["x.wav", "y.wav"], [None, 0.0], False),
        (["x.wav", "y.wav"], [None, None], True),
    ],
)
def test_a_prompt_comes_from_the_same_recording(files, offsets, continues):
    rows = utterances(20, 20, speakers=["a", "a"])
    for row, audio, offset in zip(rows, files, offsets, strict=True):
        row |= {"audio": audio, "offset_seconds": offset}
    first, second = pack_utterances(rows)
    assert second["previous_id"] == (first["id"] if continues else None)


def test_a_part_without_text_leaves_the_pack_without_text():
    rows = utterances(1, 1)
    assert next(pack_utterances(rows))["text"] == "text 0 text 1"
    assert next(pack_utterances([rows[0], rows[1] | {"text": None}]))["text"] is None
    assert next(pack_utterances([rows[0] | {"text": " a "}, rows[1] | {"text": ""}]))["text"] == "a"


def test_packs_of_other_parts_have_other_ids():
    rows = utterances(1, 1, 1)
    ids = {next(pack_utterances(chosen))["id"] for chosen in (rows, rows[:2], [rows[0], rows[2]], rows[:1], rows[1:])}
    assert len(ids) == 5


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), None])
def test_an_unusable_duration_is_named(seconds):
    with pytest.raises(ValueError, match="utterance 'u0' has duration_seconds"):
        list(pack_utterances(utterances(seconds)))


@pytest.mark.parametrize("seconds", [0, 30.5, float("nan")])
def test_packs_beyond_the_window_are_refused(seconds):
    with pytest.raises(ValueError, match="at most Whisper's 30 s"):
        list(pack_utterances([], max_seconds=seconds))


@pytest.fixture
def corpus(tmp_path):
    """Twelve clips of two alternating speakers, in several formats and rates, and segments of one recording."""
    rows = []
    for index in range(12):
        seconds, rate_hz = 4.0 + 0.37 * index, (16_000, 8_000, 22_050)[index % 3]
        name = f"{index}.{('wav', 'flac', 'mp3')[index % 3]}"
        write_tone(tmp_path / name, seconds, rate_hz, pitch_hz=200 + 40 * index)
        rows.append(utterances(seconds)[0] | {"id": f"c{index}", "audio": name, "sample_rate_hz": rate_hz})
        rows[-1] |= {"speaker": "ab"[index % 2], "text": f"clip {index}"}
    write_tone(tmp_path / "long.wav", 20.0)
    for index in range(4):
        rows.append(
            utterances(5.0)[0] | {"id": f"s{index}", "audio": "long.wav", "offset_seconds": 5.0 * index, "speaker": "c"}
        )
    write_manifest(tmp_path / "corpus.jsonl", rows)
    return read_manifest(tmp_path / "corpus.jsonl")


def test_a_packed_waveform_holds_each_clip_at_its_offset(corpus):
    packed = pack_manifest(corpus, sort_by_speaker=True)
    for pack in packed:
        waveform = load_pack(pack, 16_000)
        assert len(waveform) == round(pack["duration_seconds"] * 16_000)
        for part in pack["parts"]:
            clip = load_audio(
                part["audio"], 16_000, offset_seconds=part["offset_seconds"], duration_seconds=part["duration_seconds"]
            )
            start, num_samples = round(part["start_seconds"] * 16_000), round(part["duration_seconds"] * 16_000)
            placed = waveform[start : start + num_samples]
            torch.testing.assert_close(placed[: len(clip)], clip[:num_samples], rtol=0, atol=0)
            assert not placed[len(clip) :].any()
    assert load_pack(packed[0], 16_000, torch.int16).dtype == torch.int16
    assert len(load_pack(packed[0], 8_000)) == round(packed[0]["duration_seconds"] * 8_000)


def test_whole_corpora_are_packed_like_their_stream(corpus):
    packed = pack_manifest(corpus)
    assert list(packed) == list(pack_utterances(corpus))
    assert packed.ids == [pack["id"] for pack in packed]
    assert packed.durations_seconds.tolist() == [pack["duration_seconds"] for pack in packed]
    assert list(packed.select([3, 1])) == [packed[3], packed[1]]


def test_alternating_speakers_are_packed_once_sorted(corpus):
    assert [len(pack["parts"]) for pack in pack_manifest(corpus)] == [1] * 12 + [4]
    packed = pack_manifest(corpus, sort_by_speaker=True)
    assert [pack["speaker"] for pack in packed] == sorted(pack["speaker"] for pack in packed)
    ids = [key for pack in packed for key in part_ids(pack)]
    assert ids == [f"c{index}" for index in (*range(0, 12, 2), *range(1, 12, 2))] + ["s0", "s1", "s2", "s3"]
    assert len(packed) == 5 and max(packed.durations_seconds) <= 30


def test_only_kept_utterances_are_packed(corpus):
    packed = pack_manifest(corpus, kept=[0, 2, 4, 13, 15])
    assert [part_ids(pack) for pack in packed] == [["c0", "c2", "c4"], ["s1", "s3"]]
    assert packed[1]["parts"][0]["offset_seconds"] == 5.0
    with pytest.raises(ValueError, match="none of the 16 utterances"):
        pack_manifest(corpus, kept=[])


def test_packs_are_loaded_in_batches_and_a_bad_part_is_named(corpus, tmp_path):
    packed = pack_manifest(corpus, sort_by_speaker=True)
    (tmp_path / "2.mp3").write_bytes(b"no audio")
    (batch,) = clip_batches(packed, range(len(packed)), sample_rate_hz=16_000, batch_size=8)
    assert [row["id"] for row in batch.utterances] == packed.ids[1:]
    assert batch.waveforms.shape == (4, round(max(packed.durations_seconds[1:]) * 16_000))
    assert batch.skipped[0]["id"] == packed.ids[0] and "'c2'" in batch.skipped[0]["reason"]
    with pytest.raises(AudioError, match="'c2'"):
        load_pack(packed[0], 16_000)


def test_a_file_longer_than_its_row_does_not_move_the_others(tmp_path):
    write_tone(tmp_path / "0.wav", 1.05)
    write_tone(tmp_path / "1.wav", 0.95, pitch_hz=500)
    rows = [row | {"audio": str(tmp_path / row["audio"])} for row in utterances(1.0, 1.0)]
    (pack,) = pack_utterances(rows)
    waveform = load_pack(pack, 16_000)
    second = torch.from_numpy(soundfile.read(tmp_path / "1.wav", dtype="float32")[0])
    assert len(waveform) == 32_000
    assert torch.equal(waveform[16_000 : 16_000 + len(second)], second)
    assert not waveform[16_000 + len(second) :].any()


def test_windows_fall_from_the_number_of_clips_to_their_seconds_over_30():
    generator = torch.Generator().manual_seed(0)
    rows = utterances(*(1 + 9 * torch.rand(2000, generator=generator)).tolist())
    num_packs = len(list(pack_utterances(rows)))
    at_best = sum(row["duration_seconds"] for row in rows) / 30
    assert at_best <= num_packs < 1.15 * at_best < len(rows) / 4


def test_timestamps_lie_on_the_grid():
    assert [timestamp_token(seconds, TOKENS) - FIRST for seconds in (0, 0.02, 1.011, 29.99, 30)] == [
        0,
        1,
        51,
        1500,
        1500,
    ]
    for seconds in (-0.02, 30.02, float("nan")):
        with pytest.raises(ValueError, match="from 0 to 30 s"):
            timestamp_token(seconds, TOKENS)


def test_a_packs_label_has_the_timestamps_of_its_parts():
    (pack,) = pack_utterances(utterances(2.0, 1.0, 1.5))
    label = pack_label(pack, [[50258, 50259, 50359, 50363, 400, 401, 50257], [], [402]], TOKENS)
    assert label == [50258, 50259, 50359, FIRST, 400, 401, FIRST + 100, FIRST + 150, 402, FIRST + 225, 50257]
    assert strip_timestamps(label, TOKENS) == [50258, 50259, 50359, 50363, 400, 401, 402, 50257]
    assert pack_label(pack, [[], [], []], TOKENS) == [50258, 50259, 50359, 50363, 50257]
    with pytest.raises(ValueError, match="has 3 parts, got token ids of 2"):
        pack_label(pack, [[1], [2]], TOKENS)


def test_the_previous_packs_label_is_the_prompt_and_is_not_scored():
    packs = list(pack_utterances(utterances(20, 20, 20, speakers=["a", "a", "b"])))
    labels = {pack["id"]: pack_label(pack, [[400 + index]], TOKENS) for index, pack in enumerate(packs)}
    sequences = [prepend_prompt(labels.get(p["previous_id"], ()), labels[p["id"]], TOKENS) for p in packs]
    assert sequences == [labels[packs[0]["id"]], [50361, 400, *labels[packs[1]["id"]]], labels[packs[2]["id"]]]
    _, targets = collate_labels(sequences, TOKENS)
    assert targets[1].tolist() == [-100, -100, *labels[packs[1]["id"]][1:]]


@functools.cache
def tokenizer():
    return WhisperTokenizer.from_pretrained(bundled_path("whisper-base"))


@settings(deadline=None, max_examples=60)
@given(
    clips=st.lists(
        st.tuples(st.floats(0.05, 9.0), st.sampled_from(["", "two coffees, please", "Déjà vu 12", "नमस्ते दुनिया"])),
        min_size=1,
        max_size=12,
    )
)
def test_texts_come_back_from_a_packed_label(clips):
    rows = utterances(*(seconds for seconds, _ in clips))
    texts = {row["id"]: text for row, (_, text) in zip(rows, clips, strict=True)}
    for pack in pack_utterances(rows):
        wanted = [texts[key] for key in part_ids(pack)]
        token_ids = [tokenizer().encode(" " + text, add_special_tokens=False) if text else [] for text in wanted]
        split = split_label(pack, pack_label(pack, token_ids, TOKENS), TOKENS)
        if any(wanted) or len(wanted) == 1:
            assert [tokenizer().decode(ids).strip() for ids in split] == wanted


def label(*tokens):
    """Label of `400` text ids and of timestamps written as seconds."""
    ids = [FIRST + round(token * 50) if isinstance(token, float) else token for token in tokens]
    return [50258, 50259, 50359, *ids, 50257]


def test_segments_are_read_with_and_without_bounds():
    assert label_segments(label(0.0, 400, 2.0, 2.0, 401, 3.5), TOKENS) == [
        Segment(0.0, 2.0, [400]),
        Segment(2.0, 3.5, [401]),
    ]
    assert label_segments(label(400, 1.0, 2.0, 401), TOKENS) == [Segment(None, 1.0, [400]), Segment(2.0, None, [401])]
    assert label_segments([*TOKENS.prefix, 400, 50257], TOKENS) == [Segment(None, None, [400])]


@pytest.mark.parametrize(
    ("token_ids", "texts"),
    [
        (label(0.0, 400, 2.1, 2.1, 401, 5.0), [[400], [401], []]),  # a teacher misses the border by 0.1 s
        (label(0.0, 400, 1.0, 1.0, 401, 2.0, 5.0, 402, 7.0), [[400, 401], [], [402]]),
        (label(0.0, 400, 4.0, 5.0, 401, 7.0), [None, None, [401]]),  # one segment over two parts
        (label(0.0, 400, 1.9, 2.0, 401), [[400], None, None]),  # cut off
        (label(0.0, 400, 1.9, 401, 4.9, 5.0, 402, 7.0), [None, None, [402]]),  # text between pairs
        (label(5.0, 400, 7.4), [[], [], [400]]),  # a timestamp in the padding
        (label(4.0, 400, 1.0), [[], None, []]),  # backwards
        ([*TOKENS.prefix, 400, 50257], [None, None, None]),
        ([*TOKENS.prefix, 50257], [[], [], []]),
    ],
)
def test_a_label_is_split_only_as_far_as_its_timestamps_tell(token_ids, texts):
    (pack,) = pack_utterances(utterances(2.0, 3.0, 2.0))
    assert split_label(pack, token_ids, TOKENS) == texts


def test_a_teachers_segments_may_begin_in_the_silence_of_the_clip_before():
    (pack,) = pack_utterances(utterances(8.4, 9.4, 12.1))
    token_ids = label(0.0, 400, 5.5, 5.5, 401, 14.0, 14.0, 402, 22.0)  # whisper-base on three recorded orders
    assert split_label(pack, token_ids, TOKENS) == [[400], [401], [402]]


def test_a_pack_of_one_utterance_needs_no_timestamps():
    (pack,) = pack_utterances(utterances(2.0))
    assert split_label(pack, [*TOKENS.prefix, 400, 50257], TOKENS) == [[400]]


def test_a_teacher_labels_packs_and_bad_clips_do_not_take_their_neighbours_along(corpus, tiny_teacher, tmp_path):
    (tmp_path / "2.mp3").write_bytes(b"no audio")
    decoding = DecodingConfig(batch_size=2, max_new_tokens=5, timestamps=True)
    options = {"decoding": decoding, "max_skipped_fraction": 0.1}
    store = label_manifest(tiny_teacher, corpus.path, tmp_path / "labels", pack=True, **options)
    rows = {row["id"]: row for row in store.rows()}
    packed = pack_manifest(corpus, kept=[0, 1, *range(3, 16)])
    assert rows.keys() == set(packed.ids)
    for pack in packed:
        row = rows[pack["id"]]
        assert row["previous_id"] == pack["previous_id"] and row["duration_seconds"] == pack["duration_seconds"]
        assert [part["id"] for part in row["parts"]] == part_ids(pack)
        assert FIRST <= row["token_ids"][3] and "<|" not in row["text"]
        assert split_label(row, row["token_ids"], TOKENS) == split_label(pack, row["token_ids"], TOKENS)
    assert [row["id"] for row in read_jsonl(tmp_path / "labels/skipped.jsonl")] == ["c2"]
    with pytest.raises(LabelStoreError, match="made with other settings"):
        label_manifest(tiny_teacher, corpus.path, tmp_path / "labels", **options)


def test_a_decoder_told_to_gives_timestamps_by_whispers_rules_and_their_logprobs(tiny_teacher):
    model = load_whisper(tiny_teacher)
    states = torch.randn(3, 1500, 16, generator=torch.Generator().manual_seed(3))
    results = greedy_decode(model, states, TOKENS, max_new_tokens=12, timestamps=True)
    for row, result in enumerate(results):
        assert result.token_ids[:3] == list(TOKENS.prefix[:3])
        generated = result.token_ids[3:]
        assert FIRST <= generated[0] <= FIRST + 50  # the first segment begins within a second
        stamps = [token for token in generated if token >= FIRST]
        assert stamps == sorted(stamps) and TOKENS.no_timestamps not in generated
        alone = greedy_decode(model, states[row : row + 1], TOKENS, max_new_tokens=12, timestamps=True)
        assert alone[0].token_ids == result.token_ids
        assert alone[0].mean_logprob == pytest.approx(result.mean_logprob, abs=1e-4)
        assert result.mean_logprob < 0


def test_packs_train_a_student_like_single_utterances(corpus):
    packed = pack_manifest(corpus)
    train_set = WhisperTrainSet(packed, [pack_label(pack, [[400]] * len(pack["parts"]), TOKENS) for pack in packed])
    batch = collate_whisper([train_set[index] for index in range(len(packed))], TOKENS)
    assert batch["ids"] == packed.ids
    assert batch["audio_seconds"] == pytest.approx(sum(corpus.durations_seconds), abs=1e-3)
    assert torch.equal(batch["waveforms"][-1, :320_000], load_pack(packed[12], 16_000, torch.int16))
    # three more segments than the packs of one clip: a token and two timestamps each
    assert (batch["labels"] >= 0).sum(dim=1).tolist() == [6] * 12 + [15]
