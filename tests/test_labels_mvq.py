"""Codes of a teacher's states in a label store: fitted, made, carried on, checked, read and brought together."""

import json
import logging
import os
import signal
from dataclasses import replace

import pytest
import torch
from conftest import write_tone
from safetensors.torch import load_file, save_file
from transformers import HubertConfig, HubertModel

from speechkd.cli import main
from speechkd.data.audio import load_audio
from speechkd.data.manifest import read_manifest, write_manifest
from speechkd.frame_encoders import load_frame_encoder
from speechkd.labels import mvq_labels
from speechkd.labels.mvq_codes import collate_codes, mvq_header, mvq_key, mvq_settings, read_codes
from speechkd.labels.mvq_labels import codes_summary, fit_quantizer, label_codes
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError, check_teacher, create_store
from speechkd.labels.verify import merge_stores, verify_store
from speechkd.losses.codebook import CodebookPredictor, align_codes, codebook_loss
from speechkd.models.quantizer import Quantizer, QuantizerError, load_quantizer, save_quantizer
from speechkd.models.quantizer_fit import FitConfig
from speechkd.models.speech_encoders import save_encoder
from speechkd.preemption import Preempted

SECONDS = (2.0, 1.5, 1.5, 2.5, 3.0)
QUICK = FitConfig(bytes_per_frame=2, phase1_steps=3, phase2_steps=3, batch_size=64)


def save_hubert(folder, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    convolutions = {"conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 2, "num_conv_pos_embeddings": 16}
    encoder = HubertModel(HubertConfig(**sizes, **convolutions, feat_extract_norm="layer")).eval()
    save_encoder(encoder, folder, normalize_input=False)
    return encoder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A manifest, a teacher and quantizers of two of its layers."""
    folder = tmp_path_factory.mktemp("mvq")
    rows = []
    for index, seconds in enumerate(SECONDS):
        write_tone(folder / f"audio/{index}.wav", seconds, pitch_hz=200 + 50 * index)
        rows.append(
            {"id": f"t{index}", "audio": f"audio/{index}.wav", "duration_seconds": seconds, "sample_rate_hz": 16_000}
        )
    write_manifest(folder / "tones.jsonl", rows)
    write_manifest(folder / "first.jsonl", rows[:2])
    write_manifest(folder / "last.jsonl", rows[2:])
    save_hubert(folder / "hubert")
    for layer in (1, 2):
        fit_quantizer(str(folder / "hubert"), layer, folder / "tones.jsonl", folder / f"quantizer{layer}", config=QUICK)
    return folder


def label(place, output_dir, layers=(1, 2), manifest="tones.jsonl", **options):
    quantizers = [place / f"quantizer{layer}" for layer in layers]
    return label_codes(str(place / "hubert"), quantizers, place / manifest, output_dir, **options)


def test_a_fitted_quantizer_says_whose_frames_it_knows(place):
    quantizer = load_quantizer(place / "quantizer2")
    teacher = load_frame_encoder(str(place / "hubert")).identity
    assert quantizer.source == {"teacher": teacher, "layer": 2, "frame_rate_hz": 50.0}
    report = json.loads((place / "quantizer2/report.json").read_text())
    assert report["id"] == quantizer.id and len(report["relative_errors"]) == 6
    assert report["num_train_frames"] + report["num_held_out_frames"] == sum(int(50 * s) - 1 for s in SECONDS)
    assert (quantizer.dim, report["bytes_per_frame"], report["storage_ratio"]) == (32, 2, 64.0)


def test_stored_codes_are_those_of_the_states_of_each_clip_alone(place, tmp_path):
    store = label(place, tmp_path / "labels", batch_size=3)
    model = HubertModel.from_pretrained(place / "hubert").eval()
    for index, seconds in enumerate(SECONDS):
        waveform = load_audio(place / f"audio/{index}.wav", 16_000)
        with torch.no_grad():
            states = model(waveform[None], output_hidden_states=True).hidden_states
        stored = store.array(mvq_key(f"t{index}"))
        assert stored.dtype == torch.uint8 and stored.shape == (int(50 * seconds) - 1, 4)
        for layer in (1, 2):
            quantizer = load_quantizer(place / f"quantizer{layer}")
            codes = read_codes(store, f"t{index}", quantizer), quantizer.search(states[layer][0])
            # by what they decode to: of a tone, frames come again and again, and entries with them
            errors = [(quantizer.decode(each) - states[layer][0]).square().sum(dim=-1) for each in codes]
            torch.testing.assert_close(*errors, rtol=0, atol=1e-3)


def test_the_header_names_teacher_quantizers_layers_bytes_and_rate(place, tmp_path):
    store = label(place, tmp_path / "labels")
    ids = [load_quantizer(place / f"quantizer{layer}").id for layer in (1, 2)]
    settings = store.header["mvq"]
    assert [entry["id"] for entry in settings["quantizers"]] == ids
    assert [entry["layer"] for entry in settings["quantizers"]] == [1, 2]
    assert (settings["frame_rate_hz"], settings["bytes_per_frame"]) == (50.0, 4)
    summary = codes_summary(store)
    num_frames = sum(int(50 * seconds) - 1 for seconds in SECONDS)
    assert summary["num_frames"] == num_frames and summary["code_bytes"] == 4 * num_frames
    assert summary["storage_ratio"] == 4 * 64 / 4 and summary["num_utterances"] == 5
    arrays = [load_file(path) for path in (tmp_path / "labels").glob("*.safetensors")]
    assert sum(array.nbytes for shard in arrays for array in shard.values()) == summary["code_bytes"]


def test_codes_train_a_student_of_half_the_rate(place, tmp_path):
    store = label(place, tmp_path / "labels", layers=(2,))
    codes = collate_codes([read_codes(store, key) for key in ("t0", "t1")])
    assert codes.shape == (2, 99, 2) and (codes[1, 74:] == -100).all() and (codes[1, :74] >= 0).all()
    aligned = align_codes(codes, 50, teacher_rate_hz=store.header["mvq"]["frame_rate_hz"], student_rate_hz=25)
    loss = codebook_loss(torch.randn(2, 50, 8), aligned, CodebookPredictor(8, 4))
    assert 4 < loss.item() < 8


def test_a_run_that_was_stopped_goes_on_and_ends_with_the_same_codes(place, tmp_path, monkeypatch):
    whole = label(place, tmp_path / "whole", batch_size=1)
    codes_of = mvq_labels._codes_of

    def stopping(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return codes_of(*arguments)

    monkeypatch.setattr(mvq_labels, "_codes_of", stopping)
    with pytest.raises(Preempted, match="the same command resumes"):
        label(place, tmp_path / "stopped", batch_size=1)
    begun = [row["id"] for row in LabelStore(tmp_path / "stopped").rows()]
    assert len(begun) == 1
    monkeypatch.undo()
    store = label(place, tmp_path / "stopped", batch_size=1)
    assert sorted(row["id"] for row in store.rows()) == [f"t{index}" for index in range(5)]
    for index in range(5):
        assert store.array(mvq_key(f"t{index}")).equal(whole.array(mvq_key(f"t{index}")))


def test_a_finished_store_is_not_labelled_again(place, tmp_path, caplog):
    label(place, tmp_path / "labels")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").glob("shard*")}
    with caplog.at_level(logging.INFO):
        label(place, tmp_path / "labels")
    assert "already holds all 5 utterances" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "labels").glob("shard*")} == files


def test_stores_of_parts_are_merged_and_verified(place, tmp_path):
    label(place, tmp_path / "a", manifest="first.jsonl")
    label(place, tmp_path / "b", manifest="last.jsonl")
    merged = merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    whole = label(place, tmp_path / "whole")
    for index in range(5):
        assert read_codes(merged, f"t{index}", whole.header["mvq"]["quantizers"][1]["id"]).shape[1] == 2
    report = verify_store(tmp_path / "all", place / "tones.jsonl", str(place / "hubert"))
    assert report["problems"] == [] and report["num_rows"] == 5


def test_verification_finds_damaged_codes_and_another_teacher(place, tmp_path):
    label(place, tmp_path / "labels")
    path = next((tmp_path / "labels").glob("*.safetensors"))
    arrays = load_file(path)
    arrays[mvq_key("t3")] = arrays[mvq_key("t3")][:-1].clone()
    save_file(arrays, path)
    save_hubert(tmp_path / "other", seed=1)
    problems = verify_store(tmp_path / "labels", teacher_name=str(tmp_path / "other"))["problems"]
    assert len(problems) == 2
    assert "1 utterance(s) have arrays that are missing, damaged or of another shape: 't3'" in problems[0]
    assert "come from teacher" in problems[1]


def test_quantizers_and_stores_of_another_teacher_are_refused_with_both_named(place, tmp_path):
    save_hubert(tmp_path / "other", seed=1)
    ours = load_frame_encoder(str(place / "hubert")).identity["weights_sha256"][:12]
    theirs = load_frame_encoder(str(tmp_path / "other")).identity
    other = theirs["weights_sha256"][:12]
    with pytest.raises(QuantizerError, match=rf"fitted on teacher .* \(weights {ours}\), but this run .*{other}\)"):
        label_codes(str(tmp_path / "other"), [place / "quantizer1"], place / "tones.jsonl", tmp_path / "labels")
    store = label(place, tmp_path / "mine", layers=(1,))
    with pytest.raises(LabelStoreError, match=f"{ours}.*{other}"):
        check_teacher(store, theirs)


def test_codes_of_another_quantizer_or_rate_are_refused_with_both_named(place, tmp_path):
    store = label(place, tmp_path / "labels", layers=(1,))
    ours, other = (load_quantizer(place / f"quantizer{layer}") for layer in (1, 2))
    with pytest.raises(LabelStoreError, match=rf"codes of quantizer {ours.id} \(layer 1\), but this is.* {other.id}"):
        read_codes(store, "t0", other)
    with pytest.raises(LabelStoreError, match=f"mvq was .*{ours.id}.*, now .*{other.id}"):
        label(place, tmp_path / "labels", layers=(2,))
    with pytest.raises(LabelStoreError, match="has codes at 50 Hz, but 25 Hz are asked for"):
        read_codes(store, "t0", ours, frame_rate_hz=25)
    assert read_codes(store, "t0", ours, frame_rate_hz=50).equal(read_codes(store, "t0"))
    both = label(place, tmp_path / "both")
    with pytest.raises(LabelStoreError, match=rf"{ours.id} \(layer 1\), {other.id} \(layer 2\); say which"):
        read_codes(both, "t0")
    with pytest.raises(LabelStoreError, match="holds no codes of utterance 'nobody'"):
        read_codes(store, "nobody", ours)


def test_a_quantizer_of_another_rate_or_width_or_of_nobody_is_refused(place, tmp_path):
    quantizer = load_quantizer(place / "quantizer1")
    source = quantizer.source
    for name, changed, message in [
        ("nobody", None, "does not say whose states"),
        ("rate", {**source, "frame_rate_hz": 25.0}, "is for 32 dims at 25 Hz, but .* has 32 at 50 Hz"),
        ("layer", {**source, "layer": 3}, "layer 3 is not one of 0 to 2"),
    ]:
        quantizer.source = changed
        save_quantizer(quantizer, tmp_path / name)
        with pytest.raises(QuantizerError, match=message):
            label_codes(str(place / "hubert"), [tmp_path / name], place / "tones.jsonl", tmp_path / "labels")
    narrow = Quantizer(16, 2)
    narrow.source = source
    save_quantizer(narrow, tmp_path / "narrow")
    with pytest.raises(QuantizerError, match="is for 16 dims at 50 Hz, but .* has 32"):
        label_codes(str(place / "hubert"), [tmp_path / "narrow"], place / "tones.jsonl", tmp_path / "labels")
    with pytest.raises(QuantizerError, match="no quantizer is given"):
        label_codes(str(place / "hubert"), [], place / "tones.jsonl", tmp_path / "labels")


def test_states_with_nan_are_refused_with_the_utterance_named(place, tmp_path):
    encoder = save_hubert(tmp_path / "broken")
    with torch.no_grad():
        encoder.encoder.layers[0].final_layer_norm.bias[3] = torch.nan
    save_encoder(encoder, tmp_path / "broken", normalize_input=False)
    with pytest.raises(QuantizerError, match=r"states of utterance 't\d' hold NaN or infinity in .*broken"):
        fit_quantizer(str(tmp_path / "broken"), 1, place / "tones.jsonl", tmp_path / "quantizer", config=QUICK)
    quantizer = load_quantizer(place / "quantizer1")
    quantizer.source = {**quantizer.source, "teacher": load_frame_encoder(str(tmp_path / "broken")).identity}
    save_quantizer(quantizer, tmp_path / "fits")
    with pytest.raises(QuantizerError, match=r"states of utterance 't\d' hold NaN"):
        label_codes(str(tmp_path / "broken"), [tmp_path / "fits"], place / "tones.jsonl", tmp_path / "labels")
    assert list(LabelStore(tmp_path / "labels").rows()) == []


def test_filter_banks_are_quantized_as_well_and_a_rate_that_is_not_the_teachers_is_refused(place, tmp_path):
    fit_quantizer("log-mel", 0, place / "tones.jsonl", tmp_path / "quantizer", config=QUICK)
    store = label_codes("log-mel", [tmp_path / "quantizer"], place / "tones.jsonl", tmp_path / "labels")
    assert store.header["mvq"]["frame_rate_hz"] == 100.0
    assert {row["id"]: row["num_frames"] for row in store.rows()}["t0"] == 198  # windows of 25 ms
    clip = ({"id": "t0", "duration_seconds": 2.0}, torch.randn(32_000))
    for rate_hz in (90.0, 110.0):
        encoder = replace(load_frame_encoder("log-mel"), frames_per_second=rate_hz)
        with pytest.raises(
            QuantizerError, match=f"198 frames of utterance 't0', 2.00 s, 99.0 Hz, .* for {rate_hz:g} Hz"
        ):
            mvq_labels._states_of(encoder, [clip], torch.device("cpu"))


def test_fits_that_cannot_be_made_are_refused(place, tmp_path):
    teacher, manifest = str(place / "hubert"), place / "tones.jsonl"
    with pytest.raises(ValueError, match="quantizer1 is not empty, and codes may depend on a quantizer in it"):
        fit_quantizer(teacher, 1, manifest, place / "quantizer1", config=QUICK)
    with pytest.raises(QuantizerError, match="layer 7 is not one of 0 to 2"):
        fit_quantizer(teacher, 7, manifest, tmp_path / "a", config=QUICK)
    with pytest.raises(QuantizerError, match="100 frames, of which 5 are held out, are fewer than the 256 entries"):
        fit_quantizer(teacher, 1, manifest, tmp_path / "b", config=QUICK, max_frames=100)
    with pytest.raises(ValueError, match="max_frames must be 1 or more, got 0"):
        fit_quantizer(teacher, 1, manifest, tmp_path / "c", config=QUICK, max_frames=0)


def test_stores_without_codes_or_with_damaged_ones_are_refused(tmp_path):
    teacher = {"name": "tiny", "revision": None, "weights_sha256": "0" * 64}
    with pytest.raises(LabelStoreError, match=r"keeps no codes; its targets: \['text'\]"):
        mvq_settings(create_store(tmp_path / "text", {"teacher": teacher, "targets": ["text"]}))
    header = {"teacher": teacher, "targets": ["mvq"], "mvq": mvq_header([Quantizer(4, 2)], 50.0)}
    store = create_store(tmp_path / "codes", header)
    store.write_shard([{"id": "a"}], {mvq_key("a"): torch.zeros(5, 3, dtype=torch.uint8)})
    with pytest.raises(LabelStoreError, match=r"its codes are \(5, 3\) torch.uint8, but the store's are \(frames, 2\)"):
        read_codes(store, "a")


def run(capsys, *arguments):
    main([*map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_commands_fit_label_and_report_bytes_and_ratio(place, tmp_path, capsys):
    common = ("--teacher", place / "hubert", "--manifest", place / "tones.jsonl", "--output-dir")
    steps = ("--bytes-per-frame", 1, "--phase1-steps", 2, "--phase2-steps", 2, "--max-frames", 400)
    fitted = run(capsys, "fit-quantizer", *common, tmp_path / "quantizer", "--layer", 2, *steps)
    assert fitted["num_train_frames"] == 380 and fitted["storage_ratio"] == 128
    quantizers = ("--quantizers", tmp_path / "quantizer", place / "quantizer1")
    labelled = run(capsys, "label", *common, tmp_path / "labels", "--targets", "mvq", *quantizers)
    assert labelled["bytes_per_frame"] == 3 and labelled["storage_ratio"] == pytest.approx(256 / 3)
    assert labelled["quantizers"][0] == fitted["id"] and labelled["num_utterances"] == len(read_manifest(common[3]))
    verified = run(capsys, "label", "--verify", *common, tmp_path / "labels")
    assert verified["problems"] == []
    for options, message in [
        (("--targets", "text", "mvq", *quantizers), "stands alone and needs --quantizers, got --targets text mvq"),
        (("--targets", "mvq"), "--quantizers none"),
        (quantizers, "got --targets text and"),
        (("--targets", "mvq", *quantizers, "--pack"), "works without --pack"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, ("label", *common, tmp_path / "labels", *options))])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
