"""Scores on disk, and the command that computes them for a label store."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from conftest import tiny_whisper, write_tone
from safetensors.torch import load_file, save_file
from test_labels_scores import tiny_language_model, word_tokenizer
from transformers import BertConfig, BertModel, BertTokenizer, Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from speechkd.cli import main
from speechkd.data.audio import load_utterance
from speechkd.data.manifest import read_manifest, write_manifest
from speechkd.labels.decoding import DecodingConfig
from speechkd.labels.encoders import load_speech_encoder, load_text_encoder
from speechkd.labels.filters import FilterConfig, ScoreFilter, apply_filters
from speechkd.labels.pseudo_label import label_manifest
from speechkd.labels.score_labels import _score_in_batches, score_labels, summarize_score
from speechkd.labels.score_store import read_scores, record_origin, write_scores
from speechkd.labels.scores import language_model_nll, whisper_label_entropy
from speechkd.labels.teacher_cache import LabelStore
from speechkd.preemption import Preempted
from speechkd.teachers import load_whisper


def test_scores_are_kept_by_id_and_added_to_those_before(tmp_path):
    path = tmp_path / "scores.jsonl"
    write_scores(path, ["a", "b"], {"proxy_wer": [0.0, math.inf]})
    write_scores(path, ["b", "a"], {"lm_nll": np.array([np.nan, 2.5], dtype=np.float32)})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"id": "a", "proxy_wer": 0.0, "lm_nll": 2.5},
        {"id": "b", "proxy_wer": None, "lm_nll": None},
    ]
    assert read_scores(path, [{"id": "a", "text": "x"}]) == [{"id": "a", "text": "x", "proxy_wer": 0.0, "lm_nll": 2.5}]


def test_scores_of_too_few_utterances_are_refused(tmp_path):
    path = tmp_path / "scores.jsonl"
    with pytest.raises(ValueError, match="'lm_nll' has 1 values for 2 utterances"):
        write_scores(path, ["a", "b"], {"lm_nll": [1.0]})
    assert not path.exists()
    with pytest.raises(ValueError, match="scores.jsonl does not exist; write it with `speechkd scores`"):
        read_scores(path, [{"id": "a"}])
    write_scores(path, ["a"], {"lm_nll": [1.0]})
    with pytest.raises(ValueError, match="lacks 1 of 2 labels, the first is 'b'"):
        read_scores(path, [{"id": "a"}, {"id": "b"}])


@pytest.mark.parametrize("content", ['{"lm_nll": 1.0}\n', '{"id": "a"\n', "[1]\n"])
def test_a_scores_file_that_is_none_is_named(tmp_path, content):
    path = tmp_path / "scores.jsonl"
    path.write_text(content + '{"id": "b"}\n')
    with pytest.raises(ValueError, match="scores.jsonl is not JSONL with an id in every line"):
        read_scores(path, [{"id": "b"}])


def test_scores_of_another_model_or_of_other_labels_are_refused(tmp_path):
    record_origin(tmp_path, {"teacher": "a"}, "lm_nll", {"language_model": "x"})
    record_origin(tmp_path, {"teacher": "a"}, "lm_nll", {"language_model": "x"})
    record_origin(tmp_path, {"teacher": "a"}, "proxy_wer", {"proxy": "y"})
    with pytest.raises(ValueError, match="holds lm_nll computed from .*'x'.*, this run has .*'z'.*choose another"):
        record_origin(tmp_path, {"teacher": "a"}, "lm_nll", {"language_model": "z"})
    with pytest.raises(ValueError, match="holds scores of other labels, made by .*'a'"):
        record_origin(tmp_path, {"teacher": "b"}, "lm_nll", {"language_model": "x"})
    assert list(json.loads((tmp_path / "scores.json").read_text())["scores"]) == ["lm_nll", "proxy_wer"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Six tones, which no test changes."""
    folder = tmp_path_factory.mktemp("tones")
    rows = []
    for index in range(6):
        seconds = 1.0 + 0.2 * index
        write_tone(folder / f"audio/{index}.wav", seconds, pitch_hz=200 + 50 * index)
        row = {"id": f"tone-{index}", "audio": f"audio/{index}.wav", "duration_seconds": seconds, "text": "a tone"}
        rows.append(row | {"sample_rate_hz": 16_000})
    write_manifest(folder / "tones.jsonl", rows)
    return folder / "tones.jsonl"


@pytest.fixture(scope="module")
def labels(tiny_teacher, manifest):
    """Store with the encoder states of the tones, which no test changes."""
    folder = manifest.parent / "labels"
    label_manifest(
        tiny_teacher,
        manifest,
        folder,
        decoding=DecodingConfig(max_new_tokens=6),
        targets=("text", "encoder_states"),
    )
    return folder


@pytest.fixture
def language_model(tmp_path):
    folder = tmp_path / "language-model"
    tiny_language_model().save_pretrained(folder)
    word_tokenizer(bos_token="<s>", unk_token="<unk>").save_pretrained(folder)
    return str(folder)


def test_scores_that_a_row_holds_are_written_and_summed_up(labels, manifest, tmp_path):
    result = score_labels(labels, manifest, tmp_path / "out", ["confidence", "repeated_5grams"])
    written = {row["id"]: row for row in map(json.loads, (tmp_path / "out/scores.jsonl").read_text().splitlines())}
    rows = list(LabelStore(labels).rows())
    assert result["num_labels"] == len(rows) == len(written) == 6
    for row in rows:
        assert written[row["id"]]["confidence"] == pytest.approx(math.exp(row["mean_logprob"]))
    keep = result["scores"]["confidence"]["keep"]
    ranked = sorted((math.exp(row["mean_logprob"]) for row in rows), reverse=True)
    assert keep["0.5"]["threshold"] == pytest.approx(ranked[2])
    assert keep["0.5"]["kept_hours"] < keep["0.95"]["kept_hours"] <= result["hours"] + 1e-12


def test_a_threshold_of_the_summary_keeps_what_it_says():
    rows = [
        {"id": str(index), "text": f"text {index}", "duration_seconds": 3600.0, "lm_nll": value}
        for index, value in enumerate([4.0, 1.0, 3.0, 3.0, 2.0, 9.0, None, 5.0, 6.0, 7.0])
    ]
    summary = summarize_score(rows, "lm_nll")
    assert summary["without_value"] == 1 and summary["percentiles"]["50"] == 4.0
    assert summary["worst"][0] == "9 5: text 5"
    for fraction, kept in summary["keep"].items():
        filters = FilterConfig(
            min_mean_logprob=None,
            max_compression_ratio=None,
            max_repeated_5grams=None,
            scores=[ScoreFilter(name="lm_nll", threshold=kept["threshold"])],
        )
        assert apply_filters(rows, filters)[1].kept.kept_hours == pytest.approx(kept["kept_hours"]), fraction
    assert summary["keep"]["0.5"] == {"threshold": 3.0, "kept_hours": 4.0}


def test_entropies_from_stored_states_equal_those_from_the_audio(tiny_teacher, labels, manifest, tmp_path):
    score_labels(labels, manifest, tmp_path / "stored", ["mean_entropy"], batch_size=4)
    text_only = tmp_path / "text-only"
    label_manifest(tiny_teacher, manifest, text_only, decoding=DecodingConfig(max_new_tokens=6))
    score_labels(text_only, manifest, tmp_path / "decoded", ["mean_entropy"], batch_size=4)
    rows = list(LabelStore(labels).rows())
    stored, decoded = (read_scores(tmp_path / name / "scores.jsonl", rows) for name in ("stored", "decoded"))
    model = load_whisper(tiny_teacher)
    for row, one, other in zip(rows, stored, decoded, strict=True):
        states = LabelStore(labels).array(row["id"])[None]
        expected = whisper_label_entropy(model, states, [row["token_ids"]], num_prefix_tokens=4).item()
        assert one["mean_entropy"] == pytest.approx(expected, abs=1e-5)
        assert one["mean_entropy"] == pytest.approx(other["mean_entropy"], abs=1e-4)


def test_windows_of_joined_clips_are_scored_too(tiny_teacher, manifest, tmp_path):
    packed = tmp_path / "packed"
    label_manifest(tiny_teacher, manifest, packed, decoding=DecodingConfig(max_new_tokens=6), pack=True)
    result = score_labels(packed, manifest, tmp_path / "out", ["mean_entropy", "length_deviation"])
    (row,) = read_scores(tmp_path / "out/scores.jsonl", list(LabelStore(packed).rows()))
    assert result["num_labels"] == 1 and len(row["parts"]) == 6 and 0 < row["mean_entropy"] <= 1


def test_a_language_model_scores_texts_and_a_second_one_is_refused(labels, manifest, tmp_path, language_model):
    out = tmp_path / "out"
    score_labels(labels, manifest, out, ["lm_nll"], language_model=language_model, batch_size=4)
    rows = read_scores(out / "scores.jsonl", list(LabelStore(labels).rows()))
    expected = language_model_nll(
        [row["text"] for row in rows], tiny_language_model(), word_tokenizer(bos_token="<s>", unk_token="<unk>")
    )
    np.testing.assert_allclose([row["lm_nll"] or math.nan for row in rows], expected, rtol=1e-4)
    weights = f"{language_model}/model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds lm_nll computed from"):
        score_labels(labels, manifest, out, ["lm_nll"], language_model=language_model)


def test_a_run_that_carries_on_computes_only_what_is_missing(labels, manifest, tmp_path, language_model):
    out = tmp_path / "out"
    write_scores(out / "scores.jsonl", ["tone-0", "tone-3"], {"lm_nll": [123.0, math.nan]})
    score_labels(labels, manifest, out, ["lm_nll"], language_model=language_model)
    rows = {row["id"]: row["lm_nll"] for row in map(json.loads, (out / "scores.jsonl").read_text().splitlines())}
    assert rows["tone-0"] == 123.0 and rows["tone-3"] is None and len(rows) == 6
    assert all(value != 123.0 for key, value in rows.items() if key != "tone-0")


def test_labels_of_several_manifests_share_a_file(labels, manifest, tmp_path):
    utterances = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in utterances:
        row["audio"] = str(manifest.parent / row["audio"])
    for name, chosen in (("train", utterances[:4]), ("dev", utterances[4:])):
        write_manifest(tmp_path / f"{name}.jsonl", chosen)
        result = score_labels(labels, tmp_path / f"{name}.jsonl", tmp_path / "out", ["confidence"])
        assert result["num_labels"] == len(chosen)
    assert len(read_scores(tmp_path / "out/scores.jsonl", list(LabelStore(labels).rows()))) == 6


def test_sigterm_saves_what_was_computed(tmp_path):
    rows = [{"id": str(index), "token_ids": [0] * (9 - index)} for index in range(9)]
    scored = []

    def score_batch(batch):
        scored.extend(row["id"] for row in batch)
        if len(scored) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return np.array([float(row["id"]) for row in batch])

    with pytest.raises(Preempted, match="the scores so far are in"):
        _score_in_batches(tmp_path / "scores.jsonl", "lm_nll", rows, score_batch, 3)
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 6
    _score_in_batches(tmp_path / "scores.jsonl", "lm_nll", rows, score_batch, 3)
    assert sorted(scored) == sorted(row["id"] for row in rows)  # each once
    assert {row["id"]: row["lm_nll"] for row in read_scores(tmp_path / "scores.jsonl", rows)} == {
        str(index): float(index) for index in range(9)
    }


def paired_encoders(folder, width=16):
    """A random wav2vec 2.0 and a random sentence encoder of equal width."""
    pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    speech = Wav2Vec2Config(
        **sizes, conv_dim=[8] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, layerdrop=0.0
    )
    Wav2Vec2Model(speech).save_pretrained(folder / "speech")
    Wav2Vec2FeatureExtractor().save_pretrained(folder / "speech")
    (folder / "bert").mkdir()
    (folder / "bert/vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "tone"]))
    BertTokenizer(str(folder / "bert/vocab.txt")).save_pretrained(folder / "bert")
    BertModel(BertConfig(**sizes, vocab_size=7)).save_pretrained(folder / "bert")
    return str(folder / "speech"), str(folder / "bert")  # sentence-transformers adds mean pooling


def test_speech_and_text_are_compared_in_one_space(labels, manifest, tmp_path):
    speech, text = paired_encoders(tmp_path)
    result = score_labels(
        labels, manifest, tmp_path / "out", ["speech_text_cosine"], speech_encoder=speech, text_encoder=text
    )
    rows = read_scores(tmp_path / "out/scores.jsonl", list(LabelStore(labels).rows()))
    encode_speech, identity = load_speech_encoder(speech)
    encode_text, _ = load_text_encoder(text)
    row = next(row for row in rows if row["id"] == "tone-2")
    waveform = load_utterance(read_manifest(manifest)[2], 16_000)
    heard, read = encode_speech([waveform])[0], encode_text([row["text"]])[0]
    expected = torch.nn.functional.cosine_similarity(heard, read, dim=0).item()
    assert row["speech_text_cosine"] == pytest.approx(expected, abs=1e-4)
    assert result["scores"]["speech_text_cosine"]["without_value"] == 0 and len(identity["weights_sha256"]) == 64


def test_encoders_of_different_widths_or_for_log_mels_are_refused(labels, manifest, tiny_teacher, tmp_path):
    speech, _ = paired_encoders(tmp_path)
    wider = tmp_path / "wider"
    wider.mkdir()
    _, wide_text = paired_encoders(wider, width=32)
    out, names = tmp_path / "out", ["speech_text_cosine"]
    with pytest.raises(ValueError, match=r"speech \(6, 16\) and text \(6, 32\)"):
        score_labels(labels, manifest, out, names, speech_encoder=speech, text_encoder=wide_text)
    with pytest.raises(ValueError, match="takes input_features at 16000 Hz; give one that takes input_values"):
        load_speech_encoder(tiny_teacher)


def test_a_second_models_labels_give_the_proxy_error_rate(labels, manifest, tmp_path, tiny_teacher):
    other = tmp_path / "other-teacher"
    model = tiny_whisper(decoder_layers=3)
    torch.manual_seed(1)
    model.model.decoder.embed_tokens.weight.data.normal_()
    model.generation_config = load_whisper(tiny_teacher).generation_config
    model.save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if os.path.exists(f"{tiny_teacher}/{name}"):
            (other / name).write_bytes(open(f"{tiny_teacher}/{name}", "rb").read())
    decoding = DecodingConfig(max_new_tokens=6)
    label_manifest(str(other), manifest, tmp_path / "proxy", decoding=decoding)
    out = tmp_path / "out"
    score_labels(labels, manifest, out, ["proxy_wer"], proxy_labels=tmp_path / "proxy", normalizer="none")
    rows = read_scores(out / "scores.jsonl", list(LabelStore(labels).rows()))
    proxies = {row["id"]: row["text"] for row in LabelStore(tmp_path / "proxy").rows()}
    assert any(row["text"] != proxies[row["id"]] for row in rows)
    assert all((row["proxy_wer"] == 0) == (row["text"].split() == proxies[row["id"]].split()) for row in rows)
    with pytest.raises(ValueError, match="holds proxy_wer computed from"):
        score_labels(labels, manifest, out, ["proxy_wer"], proxy_labels=labels)


def test_the_command_prints_thresholds_and_draws(labels, manifest, tmp_path, capsys):
    arguments = ["scores", "--labels", str(labels), "--manifest", str(manifest)]
    arguments += ["--output-dir", str(tmp_path / "out"), "--scores", "confidence", "wer", "--plot"]
    main(arguments)
    printed = capsys.readouterr().out
    assert "scores_file: " in printed and "percentiles: 0 " in printed and "0.9: threshold " in printed
    assert (tmp_path / "out/confidence.png").exists() and (tmp_path / "out/wer.png").exists()
    main([*arguments, "--json"])
    assert set(json.loads(capsys.readouterr().out)["scores"]) == {"confidence", "wer"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["pesq"], "unknown scores pesq; choose from wer, cer, proxy_wer"),
        ([], "unknown scores .none given."),
        (["confidence", "lm_nll"], "score lm_nll needs --language-model"),
        (["proxy_wer"], "score proxy_wer needs --proxy-labels"),
        (["speech_text_cosine"], "needs --speech-encoder and --text-encoder"),
    ],
)
def test_a_score_that_cannot_be_computed_is_refused_before_any_work(names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        score_labels(tmp_path / "no-labels", tmp_path / "no.jsonl", tmp_path / "out", names)
    assert not (tmp_path / "out").exists()


def test_a_store_of_other_utterances_and_a_missing_model_are_named(labels, manifest, tmp_path):
    other = tmp_path / "other.jsonl"
    row = json.loads(manifest.read_text().splitlines()[0])
    row |= {"id": "another", "audio": str(manifest.parent / row["audio"])}
    other.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="holds no utterance of .*other.jsonl"):
        score_labels(labels, other, tmp_path / "out", ["confidence"])
    with pytest.raises(ValueError, match="language model 'nobody/nothing' cannot be loaded"):
        score_labels(labels, manifest, tmp_path / "out", ["lm_nll"], language_model="nobody/nothing")
