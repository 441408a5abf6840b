"""Sentence teachers, and label stores of their embeddings and of a student's lower states."""

import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer, Wav2Vec2Config, Wav2Vec2Model

from speechkd.data.audio import load_utterance
from speechkd.data.manifest import read_manifest
from speechkd.labels.embeddings import (
    cache_lower_states,
    embed_texts,
    manifest_texts,
    read_embeddings,
    read_lower_states,
)
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError, create_store
from speechkd.models.segue import SegueEncoder, embedding_loss
from speechkd.teachers_text import load_sentence_teacher

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "tone", "order", "small", "coffee"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TEXTS = [("one", "a small coffee"), ("two", "a tone"), ("three", "order a small small small coffee")]


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "bert")


def make_folder(folder, seed=0, max_seq_length=None, pooling="mean", modules=("Transformer", "Pooling", "Normalize")):
    """A random BERT in the layout of sentence-transformers, with dropout that eval mode must switch off."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    BertModel(BertConfig(**SIZES, vocab_size=len(WORDS), max_position_embeddings=12)).save_pretrained(folder)
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
    listed = [{"path": paths[kind], "type": f"sentence_transformers.models.{kind}"} for kind in modules]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(
        json.dumps({"word_embedding_dimension": 16, "pooling_mode_mean_tokens": pooling == "mean",
                    "pooling_mode_cls_token": pooling == "cls"})
    )  # fmt: skip
    if max_seq_length is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_seq_length}))
    return str(folder)


def states_of(folder, text):
    """Last hidden states of one text, (tokens, dim), by transformers alone."""
    inputs = BertTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        return BertModel.from_pretrained(folder).eval()(**inputs).last_hidden_state[0]


def test_embedding_is_the_plain_mean_with_special_tokens(folder):
    embeddings = load_sentence_teacher(folder)([text for _, text in TEXTS])
    for row, (_, text) in enumerate(TEXTS):
        torch.testing.assert_close(embeddings[row], states_of(folder, text).mean(dim=0), rtol=0, atol=1e-6)
    assert embeddings.dtype == torch.float32
    lengths = torch.linalg.vector_norm(embeddings, dim=1)
    assert (lengths - 1).abs().min() > 0.1  # no Normalize module
    normalized = load_sentence_teacher(folder, normalize=True)([text for _, text in TEXTS])
    torch.testing.assert_close(normalized, embeddings / lengths[:, None])


def test_compat_gather_is_the_first_word_piece_where_nothing_is_padded(folder):
    teacher = load_sentence_teacher(folder, pooling="compat_gather")
    states = states_of(folder, "a small coffee")
    torch.testing.assert_close(teacher(["a small coffee"])[0], states[1], rtol=0, atol=1e-6)
    longer = teacher(["a small coffee", "order a small small small coffee"])[0]
    torch.testing.assert_close(longer, (3 * states[0] + 5 * states[1]) / 8, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="pooling must be mean or compat_gather, got 'cls'"):
        load_sentence_teacher(folder, pooling="cls")


def test_teacher_stays_frozen_and_in_eval_mode(folder):
    parent = nn.Module()
    parent.teacher = load_sentence_teacher(folder)
    parent.student = nn.Linear(16, 16)
    parent.train()
    assert not any(module.training for module in parent.teacher.modules()) and parent.student.training
    before = {name: weight.clone() for name, weight in parent.teacher.state_dict().items()}
    target = parent.teacher(["a tone"])
    assert target.equal(parent.teacher(["a tone"])) and not target.requires_grad
    embedding_loss(parent.student(target), target).backward()
    torch.optim.AdamW(parent.parameters(), lr=0.1, weight_decay=0.5).step()
    assert all(weight.equal(before[name]) for name, weight in parent.teacher.state_dict().items())
    assert all(weight.grad is None and not weight.requires_grad for weight in parent.teacher.parameters())


def test_autocast_around_the_teacher_changes_nothing(folder):
    teacher = load_sentence_teacher(folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = teacher(["a tone"])
    assert inside.equal(teacher(["a tone"])) and inside.dtype == torch.float32


def test_the_shortest_limit_holds(tmp_path):
    assert load_sentence_teacher(make_folder(tmp_path / "positions")).max_tokens == 12
    teacher = load_sentence_teacher(make_folder(tmp_path / "settings", max_seq_length=5))
    assert teacher.max_tokens == 5
    assert teacher.num_tokens(["a small coffee", "a small small coffee"]) == [5, 6]
    cut, fits, other = teacher(["a small coffee tone", "a small coffee", "a small tone coffee"])
    torch.testing.assert_close(cut, fits, rtol=0, atol=1e-6)
    assert not torch.allclose(cut, other)


def test_a_model_that_embeds_otherwise_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load_sentence_teacher(make_folder(tmp_path / "plain"))
        assert "pools by" not in caplog.text and "left out" not in caplog.text
        load_sentence_teacher(make_folder(tmp_path / "cls", pooling="cls", modules=("Transformer", "Pooling", "Dense")))
    assert "pools by cls itself; it teaches with pooling mean here" in caplog.text
    assert "has the modules Dense after its pooling; they are left out" in caplog.text


def test_texts_that_teach_nothing_are_refused(folder):
    teacher = load_sentence_teacher(folder)
    for wrong in ("", " \n", None):
        with pytest.raises(ValueError, match="text 1 of the batch is .*empty or missing text"):
            teacher(["a tone", wrong])
    with pytest.raises(ValueError, match="takes a list of texts with at least one"):
        teacher([])
    with pytest.raises(ValueError, match="takes a list of texts with at least one, got 'a tone'"):
        teacher("a tone")


def test_a_teacher_that_cannot_be_loaded_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="(?s)sentence teacher '.*empty' cannot be loaded.*bundled:minilm-l6"):
        load_sentence_teacher(str(tmp_path / "empty"))
    model = BertModel.from_pretrained(folder)
    kept = {key: weight for key, weight in model.state_dict().items() if "attention.self.query" not in key}
    model.save_pretrained(folder, state_dict=kept)
    with pytest.raises(ValueError, match="has no weights for 2 parameters, first encoder.layer.0.attention.self.query"):
        load_sentence_teacher(folder)


def test_bundled_minilm_embeds_as_sentence_transformers_does():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    teacher = load_sentence_teacher("bundled:minilm-l6", normalize=True)
    texts = ["I'd like a small iced mocha", "Turn the lights off in the kitchen, please.", "seven"]
    assert teacher.dim == 384 and teacher.max_tokens == 256
    model = sentence_transformers.SentenceTransformer(teacher.encoder.name_or_path, device="cpu")
    torch.testing.assert_close(teacher(texts), torch.from_numpy(model.encode(texts)), rtol=0, atol=1e-5)


def test_stored_embeddings_are_the_live_teachers(folder, tmp_path):
    teacher = load_sentence_teacher(folder)
    store, counts = embed_texts(teacher, TEXTS, tmp_path / "store")
    live = teacher([text for _, text in TEXTS])
    stored = read_embeddings(LabelStore(tmp_path / "store"), ["three", "one", "two"])
    torch.testing.assert_close(stored, live[[2, 0, 1]], rtol=0, atol=1e-6)
    assert (counts.num_texts, counts.num_embedded, counts.num_skipped, counts.num_cut) == (3, 3, 0, 0)
    assert store.header["teacher"]["weights_sha256"] == teacher.identity["weights_sha256"]
    assert store.header["teacher"]["name"] == folder
    assert store.header["embeddings"] == {
        "pooling": "mean",
        "normalize": False,
        "max_tokens": 12,
        "dim": 16,
        "dtype": "float32",
        "bytes_per_utterance": 64,
    }
    assert [row["id"] for row in store.rows()] == ["one", "two", "three"]
    assert read_embeddings(store, []).shape == (0, 16)


def test_compat_embeddings_do_not_depend_on_their_neighbours(folder, tmp_path):
    teacher = load_sentence_teacher(folder, pooling="compat_gather")
    store, _ = embed_texts(teacher, TEXTS, tmp_path / "store")
    torch.testing.assert_close(read_embeddings(store, ["two"]), teacher(["a tone"]), rtol=0, atol=1e-6)


def test_empty_and_missing_texts_are_skipped_and_counted(folder, tmp_path, caplog):
    texts = [*TEXTS, ("four", ""), ("five", None), ("six", "  ")]
    with caplog.at_level(logging.WARNING):
        store, counts = embed_texts(load_sentence_teacher(folder), texts, tmp_path / "store")
    assert (counts.num_texts, counts.num_embedded, counts.num_skipped) == (6, 3, 3)
    assert "3 of 6 utterances have an empty or missing text and are skipped; first: 'four'" in caplog.text
    with pytest.raises(LabelStoreError, match="holds no embedding of utterance 'four': it had no text"):
        read_embeddings(store, ["one", "four"])


def test_long_texts_are_cut_counted_and_told(tmp_path, caplog):
    teacher = load_sentence_teacher(make_folder(tmp_path / "bert", max_seq_length=5))
    with caplog.at_level(logging.WARNING):
        store, counts = embed_texts(teacher, TEXTS, tmp_path / "store")
        again = embed_texts(teacher, TEXTS, tmp_path / "store")[1]
    assert counts.num_cut == 1 and again == counts
    assert (
        "1 of 3 texts are longer than the teacher's 5 tokens and were cut; first: utterance 'three' with 8"
        in caplog.text
    )
    assert [(row["id"], row["is_cut"]) for row in store.rows()] == [("one", False), ("two", False), ("three", True)]


def test_an_interrupted_store_is_finished_without_a_row_twice(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("speechkd.labels.embeddings.SHARD_TEXTS", 2)
    teacher = load_sentence_teacher(folder)
    embed_texts(teacher, TEXTS[:1], tmp_path / "store")
    embedded = []
    monkeypatch.setattr(
        teacher, "forward", lambda texts, forward=teacher.forward: embedded.extend(texts) or forward(texts)
    )
    store, counts = embed_texts(teacher, [*TEXTS, ("four", "coffee")], tmp_path / "store")
    assert sorted(embedded) == sorted([TEXTS[1][1], TEXTS[2][1], "coffee"]) and counts.num_embedded == 4
    assert [row["id"] for row in store.rows()] == ["one", "two", "three", "four"]
    assert len(store.row_files()) == 3


def test_a_store_of_another_teacher_pooling_or_text_is_refused(folder, tmp_path):
    embed_texts(load_sentence_teacher(folder), TEXTS, tmp_path / "store")
    other = load_sentence_teacher(make_folder(tmp_path / "other", seed=1))
    with pytest.raises(LabelStoreError, match="come from teacher .*bert .*but this run has .*other"):
        embed_texts(other, TEXTS, tmp_path / "store")
    with pytest.raises(LabelStoreError, match="other settings: embeddings was .*'mean'.*now .*'compat_gather'"):
        embed_texts(load_sentence_teacher(folder, pooling="compat_gather"), TEXTS, tmp_path / "store")
    with pytest.raises(LabelStoreError, match="holds the embedding of 'a tone' for utterance 'two', whose text is now"):
        embed_texts(load_sentence_teacher(folder), [("two", "a coffee")], tmp_path / "store")


def test_texts_that_cannot_be_embedded_are_refused(folder, tmp_path):
    teacher = load_sentence_teacher(folder)
    with pytest.raises(ValueError, match="utterance 'one' comes 2 times among the texts"):
        embed_texts(teacher, [*TEXTS, TEXTS[0]], tmp_path / "store")
    with pytest.raises(ValueError, match="none of 2 utterances has a text to embed"):
        embed_texts(teacher, [("a", None), ("b", "")], tmp_path / "store")
    with torch.no_grad():
        teacher.encoder.embeddings.word_embeddings.weight[WORDS.index("tone")] = torch.nan
    with pytest.raises(ValueError, match="the embedding of utterance 'two', 'a tone', holds NaN"):
        embed_texts(teacher, TEXTS, tmp_path / "store")
    assert not list(LabelStore(tmp_path / "store").rows())


def test_a_store_without_embeddings_says_what_it_keeps(tmp_path):
    store = create_store(tmp_path / "store", {"teacher": {"name": "t", "weights_sha256": "0"}, "targets": ["text"]})
    with pytest.raises(LabelStoreError, match=r"keeps no embeddings; its targets: \['text'\]"):
        read_embeddings(store, ["one"])


def test_texts_come_from_the_manifest_or_from_transcripts(tone_manifest, tmp_path):
    assert list(manifest_texts(tone_manifest)) == [(f"tone-{index}", "a tone") for index in range(6)]
    store = create_store(tmp_path / "labels", {"teacher": {"name": "t", "weights_sha256": "0"}, "targets": ["text"]})
    store.write_shard([{"id": "tone-1", "text": "a small tone"}, {"id": "elsewhere", "text": "order"}], {})
    spoken = dict(manifest_texts(tone_manifest, tmp_path / "labels"))
    assert spoken == {f"tone-{index}": "a small tone" if index == 1 else None for index in range(6)}


def make_student(seed=0, num_frozen_layers=1):
    torch.manual_seed(seed)
    sizes = SIZES | {"num_hidden_layers": 2}
    config = Wav2Vec2Config(
        **sizes, conv_dim=[8] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, layerdrop=0.0
    )
    return SegueEncoder(Wav2Vec2Model(config), num_frozen_layers=num_frozen_layers)


def test_stored_lower_states_give_the_live_students_embeddings(tone_manifest, tmp_path):
    student = make_student()
    store = cache_lower_states(student, "tiny", tone_manifest, tmp_path / "states", batch_size=4)
    assert store.header["lower_states"]["layer"] == 1 and store.header["lower_states"]["bytes_per_frame"] == 32
    rows = {row["id"]: row for row in store.rows()}
    student.eval()
    for utterance in read_manifest(tone_manifest):
        waveform, row = load_utterance(utterance, 16_000), rows[utterance["id"]]
        num_samples = torch.tensor([row["num_samples"]])
        assert len(waveform) == row["num_samples"]
        states = read_lower_states(store, utterance["id"])
        assert states.dtype == torch.float16 and len(states) == row["num_frames"]
        live, cached = student(waveform[None], num_samples), student(None, num_samples, states[None])
        torch.testing.assert_close(cached, live, rtol=0, atol=5e-3)  # half precision on disk
    num_files = len(store.row_files())
    again = cache_lower_states(student, "tiny", tone_manifest, tmp_path / "states")
    assert len(again.row_files()) == num_files  # nothing is left to do
    with pytest.raises(LabelStoreError, match="holds no lower states of utterance 'x'"):
        read_lower_states(store, "x")


def test_lower_states_of_other_layers_are_refused(tone_manifest, tmp_path):
    cache = partial(cache_lower_states, name="tiny", source=tone_manifest, output_dir=tmp_path / "states")
    cache(make_student())
    with pytest.raises(LabelStoreError, match="come from teacher tiny"):
        cache(make_student(seed=1))
    with pytest.raises(ValueError, match="num_frozen_layers=0: no states can be kept"):
        cache(make_student(num_frozen_layers=0))
    assert Path(tmp_path / "states/header.json").is_file()
