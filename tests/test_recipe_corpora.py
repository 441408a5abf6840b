"""Corpora of the Distil-Whisper recipe: several of them, their languages, and what cannot go together."""

from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TOKENS, write_tone
from corpora import batch_sampler, build_sets, check_data, label_draws
from test_data_whisper import EVERY_LABEL, label_row, write_store
from test_recipes import FSDD, arguments
from transformers import WhisperTokenizer

from speechkd.bundled import bundled_path
from speechkd.check_config import check_config
from speechkd.config import CorpusConfig, DataConfig
from speechkd.data.collate import WhisperTokens
from speechkd.data.manifest import write_manifest
from speechkd.data.mixture import Mixture
from speechkd.data.whisper import collate_whisper
from speechkd.estimate import _costliest_batch
from speechkd.labels.decoding import DecodingConfig
from speechkd.labels.filters import FilterConfig


def write_corpus(folder: Path, prefix: str, num_clips: int, **store) -> dict[str, str]:
    """A manifest of tones with texts, and a store of labels of 5 to 4 + num_clips tokens."""
    rows, labels = [], []
    for index in range(num_clips):
        write_tone(folder / f"{prefix}-{index}.wav", 1.0)
        row = {"id": f"{prefix}-{index}", "audio": f"{prefix}-{index}.wav", "duration_seconds": 1.0}
        rows.append({**row, "sample_rate_hz": 16_000, "text": "eins zwei"})
        labels.append(label_row(row["id"], 1.0, [*TOKENS.prefix, *[400] * index, TOKENS.end_of_text], "a b c"))
    write_manifest(folder / f"{prefix}.jsonl", rows)
    write_store(folder / f"{prefix}-labels/train", labels, **store)
    return {"train_manifest": str(folder / f"{prefix}.jsonl"), "labels_dir": str(folder / f"{prefix}-labels")}


@pytest.fixture(scope="module")
def tokenizer() -> WhisperTokenizer:
    return WhisperTokenizer.from_pretrained(bundled_path("whisper-base"))


def build(data: DataConfig, tokenizer, tmp_path: Path, **changes):
    settings = {
        "identity": None,
        "cached_encoder_states": False,
        "stored_outputs": None,
        "tokenizer": tokenizer,
        "output_dir": tmp_path / "run",
    }

    def tokens_of(decoding: DecodingConfig) -> WhisperTokens:
        return WhisperTokens.from_tokenizer(tokenizer, language=decoding.language, task=decoding.task)

    return build_sets(data, DecodingConfig(), EVERY_LABEL, tokens_of=tokens_of, **{**settings, **changes})


def test_each_corpus_has_labels_of_its_own_language_and_its_share_of_the_batches(tokenizer, tmp_path):
    main = write_corpus(tmp_path, "main", 12)
    extra = [
        CorpusConfig(**write_corpus(tmp_path, "fr", 6, language="fr"), language="fr", weight=2.0),
        CorpusConfig(train_manifest=write_corpus(tmp_path, "de", 4)["train_manifest"], language="de", weight=1.0),
    ]
    data = DataConfig(**main, test_manifest="", weight=3.0, extra_corpora=extra)
    corpora, dev_set, reports = build(data, tokenizer, tmp_path)
    assert [len(corpus) for corpus in corpora] == [12, 6, 4] and dev_set is None
    assert corpora[2].token_ids[0][:3] == tokenizer.convert_tokens_to_ids(
        ["<|startoftranscript|>", "<|de|>", "<|transcribe|>"]
    )
    assert tokenizer.decode(corpora[2].token_ids[0], skip_special_tokens=True) == " eins zwei"
    assert list(reports) == [corpus.train_manifest for corpus in data.corpora]
    sampler = batch_sampler(corpora, [corpus.weight for corpus in data.corpora], 60.0)
    corpus_of = np.repeat([0, 1, 2], [12, 6, 4])
    batches = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        batches += list(sampler)
    taken = Counter(int(corpus_of[batch[0]]) for batch in batches)
    assert all(len({int(number) for number in corpus_of[batch]}) == 1 for batch in batches)
    assert taken == {0: 33, 1: 22, 2: 11}  # 6 epochs of 11 batches, as 3 : 2 : 1


def test_batches_hold_labels_of_similar_length_and_are_as_full_as_before(tokenizer, tmp_path):
    data = DataConfig(**write_corpus(tmp_path, "main", 96), test_manifest="")
    (corpus,), _, _ = build(data, tokenizer, tmp_path)
    sampler = batch_sampler([corpus], [1.0], 240.0, seed=1)
    batches = list(sampler)
    assert [len(batch) for batch in batches] == [8] * 12 and sorted(sum(batches, [])) == list(range(96))
    # three batches are sorted together: their clips are about a third as far apart as in the corpus
    assert np.mean([np.ptp(corpus.label_lengths[batch]) for batch in batches]) < 0.4 * 95


def test_the_trial_of_a_step_takes_the_batch_with_the_longest_labels(tokenizer, tmp_path):
    first, second = (write_corpus(tmp_path, name, count) for name, count in (("a", 20), ("b", 40)))
    data = DataConfig(**first, test_manifest="", extra_corpora=[CorpusConfig(**second)])
    corpora, _, _ = build(data, tokenizer, tmp_path)
    trainer = SimpleNamespace(
        train_dataset=Mixture(corpora),
        sampler=batch_sampler(corpora, [1.0, 1.0], 240.0),
        data_collator=partial(collate_whisper, tokens=TOKENS),
    )
    indices, batch, _ = _costliest_batch(trainer)
    assert 59 in indices and batch["labels"].shape[1] == max(map(len, corpora[1].token_ids)) - 1


def test_labels_of_another_language_or_of_windows_are_refused(tokenizer, tmp_path):
    french = write_corpus(tmp_path, "fr", 3, language="fr")
    with pytest.raises(ValueError, match=r"fr-labels/train were made with language 'fr', the configuration has 'en'"):
        build(DataConfig(**french, test_manifest=""), tokenizer, tmp_path)
    clips = write_corpus(tmp_path, "clips", 3)
    with pytest.raises(ValueError, match="are of single clips, the configuration has data.pack=true; .*with --pack"):
        build(DataConfig(**clips, test_manifest="", pack=True), tokenizer, tmp_path)
    windows = write_corpus(tmp_path, "windows", 3, pack=True)
    with pytest.raises(ValueError, match=r"are of windows \(--pack\), the configuration has data.pack=false"):
        build(DataConfig(**windows, test_manifest=""), tokenizer, tmp_path)


def test_probabilities_that_can_never_act_are_refused(tokenizer, tmp_path):
    data = partial(DataConfig, **write_corpus(tmp_path, "main", 3), test_manifest="")
    corpora, _, _ = build(data(), tokenizer, tmp_path)
    assert label_draws(data(), corpora, TOKENS, seed=5).seed == 5
    with pytest.raises(ValueError, match="timestamp_probability=0.5, but no label has timestamps; label again with"):
        label_draws(data(timestamp_probability=0.5), corpora, TOKENS, seed=0)
    with pytest.raises(ValueError, match="previous_text_probability=1, but no label has one before it; set data.pack"):
        label_draws(data(previous_text_probability=1.0), corpora, TOKENS, seed=0)


@pytest.mark.parametrize(
    ("changes", "timestamps", "max_wer", "cached", "message"),
    [
        (
            {"timestamp_probability": 0.2},
            False,
            None,
            False,
            "needs labels with timestamps; set decoding.timestamps=tr",
        ),
        ({"labels_dir": None, "timestamp_probability": 0.2}, False, None, False, "needs labels with timestamps"),
        ({"labels_dir": None}, False, None, True, "cache_encoder_states needs data.labels_dir"),
        ({"pack": True}, False, 10.0, False, "data.pack with a WER or CER filter needs decoding.timestamps=true"),
        ({"pack": True}, True, 10.0, True, "and teacher.cache_encoder_states=false"),
        (
            {"extra_corpora": [CorpusConfig(train_manifest="b", labels_dir="labels")]},
            False,
            None,
            False,
            "twice in labels",
        ),
    ],
)
def test_settings_that_cannot_go_together_are_named_before_any_work(changes, timestamps, max_wer, cached, message):
    data = DataConfig(**{"train_manifest": "a", "test_manifest": "t", "labels_dir": "labels", **changes})
    with pytest.raises(ValueError, match=message):
        check_data(data, DecodingConfig(timestamps=timestamps), FilterConfig(max_wer=max_wer), cached)


def test_settings_that_do_go_together_pass():
    data = {"train_manifest": "a", "test_manifest": "t"}
    check_data(
        DataConfig(**data, pack=True, timestamp_probability=0.5), DecodingConfig(), FilterConfig(max_wer=9), False
    )
    packed = DataConfig(**data, labels_dir="labels", pack=True, timestamp_probability=0.5)
    check_data(packed, DecodingConfig(timestamps=True), FilterConfig(max_wer=9), False)
    check_data(packed, DecodingConfig(timestamps=True), FilterConfig(), True)


def test_doctor_checks_every_corpus(tmp_path):
    main = write_corpus(tmp_path, "main", 3)
    missing = tmp_path / "none"
    corpora = (
        f"[{{train_manifest: {main['train_manifest']}, labels_dir: {missing}, language: fr}},"
        f" {{train_manifest: {tmp_path / 'no.jsonl'}}}]"
    )
    given = arguments(FSDD, str(tmp_path / "no-teacher"), Path(main["train_manifest"]), Path(main["labels_dir"]))
    more = ["--teacher.cache_encoder_states=false", "--teacher.stored_outputs=null", "--data.pack=true"]
    more += [f"--data.extra_corpora={corpora}"]
    facts = check_config(FSDD, [*given[2:], *more])
    problems = "\n".join(facts["problems"])
    command = f"--manifest {main['train_manifest']} --output-dir {missing}/train --language fr"
    assert "data.extra_corpora[0].labels_dir: " in problems and command in problems and "--pack`" in problems
    assert "data.extra_corpora[1].train_manifest: manifest" in problems and "no.jsonl does not exist" in problems
    assert "3 utterance ids are both in data.extra_corpora[0].train_manifest and data.test_manifest" in problems
    assert facts["labels"]["train"]["num_labels"] == 3
    assert facts["manifests"]["train, data.extra_corpora[0]"]["num_utterances"] == 3


@pytest.mark.parametrize("outputs", ["topk", "decoder_states"])
def test_doctor_misses_stored_outputs_in_the_stores_that_are_trained_on(outputs, tmp_path):
    main = write_corpus(tmp_path, "main", 3)
    given = arguments(FSDD, str(tmp_path / "no-teacher"), Path(main["train_manifest"]), Path(main["labels_dir"]))
    more = ["--teacher.cache_encoder_states=false", f"--teacher.stored_outputs={outputs}", "--loss.temperature=1"]
    problems = "\n".join(check_config(FSDD, [*given[2:], *more])["problems"])
    lacking = f"{main['labels_dir']}/train holds no {outputs.replace('_', ' ')}, which teacher.stored_outputs={outputs}"
    assert lacking in problems and f"--targets text {outputs} --language en" in problems
    assert problems.count(lacking.split(" holds ")[1]) == 1  # not in the labels of the test manifest


def test_weights_must_be_positive_numbers(tmp_path):
    with pytest.raises(ValueError, match="the weight of b is 0; it must be a positive number, leave out"):
        CorpusConfig(train_manifest="b", weight=0)
    with pytest.raises(ValueError, match="data.weight must be a positive number, got -1"):
        DataConfig(train_manifest="a", test_manifest="t", weight=-1)
    with pytest.raises(ValueError, match="data.timestamp_probability must be 0 to 1, got 1.5"):
        DataConfig(train_manifest="a", test_manifest="t", timestamp_probability=1.5)
