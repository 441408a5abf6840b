import json

import pytest
import torch
from conftest import TOKENS, write_tone

from speechkd.cli import main
from speechkd.data.features import WhisperLogMel
from speechkd.data.manifest import write_manifest
from speechkd.evaluate import evaluate_asr
from speechkd.labels.pseudo_label import DecodingConfig
from speechkd.labels.teacher_cache import LabelStoreError
from speechkd.models.greedy import greedy_tokens
from speechkd.models.long_form import (
    LongFormConfig,
    chunk_bounds,
    merge_chunks,
    text_ids,
    transcribe_chunked,
    transcribe_sequential,
)
from speechkd.teachers import load_processor, load_whisper

DECODING = DecodingConfig(max_new_tokens=5)


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    """With larger weights, so that its text hangs on what it hears."""
    model = load_whisper(tiny_teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight.normal_()
        for weight in [*model.model.decoder.layers.parameters(), *model.model.encoder.layers.parameters()]:
            weight.normal_(std=0.4)
    return model


@pytest.fixture
def long_manifest(tmp_path):
    """A clip of 70 s and one of 2 s."""
    rows = []
    for name, seconds in (("long", 70.0), ("short", 2.0)):
        write_tone(tmp_path / f"{name}.wav", seconds)
        row = {"id": name, "audio": f"{name}.wav", "duration_seconds": seconds, "sample_rate_hz": 16_000}
        rows.append({**row, "text": "a tone", "dialect": name})
    write_manifest(tmp_path / "long.jsonl", rows)
    return tmp_path / "long.jsonl"


@pytest.mark.parametrize("num_samples", [1, 29, 30, 31, 50, 51, 70, 3600])
def test_chunks_cover_a_recording_and_share_a_sixth_at_each_side(num_samples):
    bounds = chunk_bounds(num_samples, 30)
    assert bounds[0][0] == 0 and bounds[-1][1] == num_samples
    assert all(end - start == 30 for start, end in bounds[:-1]) and 0 < bounds[-1][1] - bounds[-1][0] <= 30
    assert all(before[1] - after[0] == 10 for before, after in zip(bounds, bounds[1:], strict=False))
    assert len(bounds) < 2 or bounds[-2][1] < num_samples  # no chunk that another one holds entirely


@pytest.mark.parametrize(
    ("chunks", "merged"),
    [
        ([[1, 2, 3, 4, 5, 6], [4, 5, 6, 7, 8]], [1, 2, 3, 4, 5, 6, 7, 8]),
        ([[1, 2, 3, 4, 5, 90], [91, 3, 4, 5, 6]], [1, 2, 3, 4, 5, 6]),  # a wrong word at each border
        ([[1, 2], [3, 4], [5]], [1, 2, 3, 4, 5]),
        ([[1, 2, 7], [7, 3, 4]], [1, 2, 7, 7, 3, 4]),  # one token is chance
        ([[8, 9, 1, 8, 9], [8, 9, 2]], [8, 9, 1, 8, 9, 2]),  # of two equal runs the one at the border
        ([[1, 2, 3], [2, 3, 4], [3, 4, 5]], [1, 2, 3, 4, 5]),
        ([[1, 2, 3, 9], [], [2, 3, 4]], [1, 2, 3, 9, 2, 3, 4]),  # what lies a silent chunk back cannot overlap
        ([], []),
    ],
)
def test_chunks_are_joined_at_their_longest_common_run(chunks, merged):
    assert merge_chunks(chunks) == merged


def test_a_clip_within_one_chunk_is_its_greedy_transcript(teacher):
    log_mel = WhisperLogMel(80)
    waveform = torch.randn(16_000, generator=torch.Generator().manual_seed(0))
    states = teacher.model.encoder(log_mel(waveform[None])).last_hidden_state
    expected = greedy_tokens(teacher, states, TOKENS, max_new_tokens=12)[0].token_ids
    result = transcribe_chunked(teacher, log_mel, waveform, TOKENS, max_new_tokens=12)
    assert result.token_ids == text_ids(expected, TOKENS) != []
    assert (result.num_windows, result.num_unfinished) == (1, int(expected[-1] != TOKENS.end_of_text))


def test_the_batch_size_changes_no_text_and_bounds_what_is_encoded_at_once(teacher):
    waveform = torch.randn(80 * 16_000, generator=torch.Generator().manual_seed(0))
    batches: list[int] = []
    log_mel = WhisperLogMel(80)
    log_mel.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    texts = [
        transcribe_chunked(teacher, log_mel, waveform, TOKENS, batch_size=size, max_new_tokens=4).token_ids
        for size in (1, 3)
    ]
    assert texts[0] == texts[1] != []
    assert batches == [1, 1, 1, 1, 3, 1]


def test_sampling_at_higher_temperatures_is_seeded_and_leaves_the_random_state(tiny_teacher):
    teacher = load_whisper(tiny_teacher)  # nearly uniform, so that every temperature is tried and the last one counts
    extractor = load_processor(tiny_teacher).feature_extractor
    waveform = torch.randn(2 * 16_000, generator=torch.Generator().manual_seed(0))
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(7)
        before = torch.get_rng_state()
        result = transcribe_sequential(teacher, extractor, waveform, TOKENS, language="en", max_new_tokens=4, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        texts.append(result.token_ids)
    assert texts[0] == texts[1] != texts[2]
    assert max(texts[0]) < TOKENS.first_special


def test_clips_above_30_s_are_skipped_by_name_with_the_way_out_and_transcribed_when_asked(
    tiny_teacher, long_manifest, tmp_path, caplog
):
    skipped = evaluate_asr(tiny_teacher, long_manifest, tmp_path / "out", decoding=DECODING, max_skipped_fraction=0.5)
    assert skipped["num_skipped"] == 1 and "'long'; pass --long-form chunked" in caplog.text
    with pytest.raises(LabelStoreError, match="other settings"):
        evaluate_asr(tiny_teacher, long_manifest, tmp_path / "out", decoding=DECODING, long_form=LongFormConfig())


def test_the_command_scores_long_clips_with_all_measures_and_resumes(
    tiny_teacher, long_manifest, tmp_path, capsys, caplog
):
    arguments = ["evaluate", "--model", tiny_teacher, "--manifest", str(long_manifest), "--max-new-tokens", "5"]
    arguments += ["--output-dir", str(tmp_path / "out"), "--long-form", "chunked", "--chunk-seconds", "20", "--json"]
    main([*arguments, "--group-by", "dialect"])
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["num_skipped"] == 0 and metrics["audio_seconds"] == 72
    assert metrics["long_form"] == {"method": "chunked", "chunk_seconds": 20.0, "seed": 0}
    assert metrics["wer"] == pytest.approx(
        sum(metrics[f"{kind}_error_rate"] for kind in ("insertion", "substitution", "deletion"))
    )
    for name in ("five_gram_duplicates", "wer_low", "wer_high", "rtfx"):
        assert metrics[name] >= 0, name
    assert set(metrics["groups"]["dialect"]) == {"long", "short"}
    assert "long: 5 of 5 chunks were cut off" in caplog.text

    (shard,) = (tmp_path / "out/decoded").glob("shard-*.jsonl")
    before = shard.read_text()
    main([*arguments, "--group-by", "dialect"])
    assert json.loads(capsys.readouterr().out) == metrics and shard.read_text() == before


def test_a_broken_long_clip_is_named_and_the_others_are_scored(tiny_teacher, long_manifest, tmp_path):
    content = (tmp_path / "long.wav").read_bytes()
    (tmp_path / "long.wav").write_bytes(content[: len(content) // 2])
    metrics = evaluate_asr(
        tiny_teacher,
        long_manifest,
        tmp_path / "out",
        decoding=DECODING,
        long_form=LongFormConfig(method="sequential"),
        max_skipped_fraction=0.5,
    )
    assert metrics["num_skipped"] == 1 and metrics["num_utterances"] == 1
    assert json.loads((tmp_path / "out/decoded/skipped.jsonl").read_text())["id"] == "long"


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"chunk_seconds": 31.0}, "chunk_seconds=31 must be 1 to 30"), ({"method": "tiles"}, "'tiles' is unknown")],
)
def test_settings_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LongFormConfig(**fields)
