import pytest
import torch
from conftest import TOKENS, tiny_whisper

from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError, create_store
from speechkd.labels.topk_labels import topk_of_labels
from speechkd.labels.topk_records import (
    bytes_per_token,
    collate_topk,
    decode_topk,
    encode_topk,
    read_topk,
    topk_header,
    topk_key,
)
from speechkd.losses.sparse import TopK, topk_divergence, topk_targets

WHISPER, LARGE = 51_865, 151_936
TEACHER = {"name": "tiny", "weights_sha256": "0" * 64}


def zipf_logits(num_tokens, vocabulary, exponent=2.0, seed=0):
    """Student's and teacher's logits: a Zipf prior with noise, and the teacher with noise."""
    generator = torch.Generator().manual_seed(seed)
    prior = -exponent * torch.arange(1, vocabulary + 1).log()
    teacher = prior + 1.5 * torch.randn(num_tokens, vocabulary, generator=generator)
    return teacher + 0.7 * torch.randn(num_tokens, vocabulary, generator=generator), teacher


def written_store(folder, vocabulary=40, k=3):
    header = {"teacher": TEACHER, "targets": ["text", "topk"], "topk": topk_header(k, vocabulary)}
    store = create_store(folder, header)
    targets = {key: topk_targets(zipf_logits(6 + n, vocabulary, seed=n)[1], k) for n, key in enumerate(("a", "b"))}
    records = {topk_key(key): encode_topk(targets[key], vocabulary) for key in targets}
    store.write_shard([{"id": key} for key in targets], records)
    return LabelStore(folder), targets


@pytest.mark.parametrize(("vocabulary", "size"), [(WHISPER, 260), (65_536, 260), (65_537, 388), (LARGE, 388)])
def test_records_have_the_reported_size(vocabulary, size):
    targets = topk_targets(torch.randn(3, vocabulary), 64)
    assert bytes_per_token(64, vocabulary) == size
    assert encode_topk(targets, vocabulary).shape == (3, size)
    assert topk_header(64, vocabulary)["bytes_per_token"] == size


@pytest.mark.parametrize("vocabulary", [65_536, LARGE])
def test_decoding_gives_back_what_was_encoded(vocabulary):
    ids = torch.tensor([[vocabulary - 1, 0], [7, vocabulary - 2]])
    log_tail = torch.tensor([-1.2345678, -torch.inf])
    targets = TopK(ids, torch.tensor([[-0.5, -2.25], [-0.125, -65000.0]]), log_tail)
    decoded = decode_topk(encode_topk(targets, vocabulary), 2, vocabulary)
    assert decoded.ids.dtype == torch.int64 and decoded.log_probs.dtype == torch.float32
    assert torch.equal(decoded.ids, ids) and torch.equal(decoded.log_tail, log_tail)
    assert torch.equal(decoded.log_probs, targets.log_probs.half().float())


def test_the_bytes_of_a_record_are_those_documented():
    targets = TopK(torch.tensor([[258, 1]]), torch.tensor([[-1.0, -2.0]]), torch.tensor([-0.5]))
    expected = [2, 1, 1, 0, 0x00, 0xBC, 0x00, 0xC0, 0, 0, 0, 0xBF]
    assert encode_topk(targets, WHISPER)[0].tolist() == expected


def test_an_utterance_of_no_tokens_has_no_records():
    records = encode_topk(topk_targets(torch.zeros(0, 10), 2), 10)
    assert records.shape == (0, 12)
    assert decode_topk(records, 2, 10).ids.shape == (0, 2)


def test_half_precision_moves_log_probabilities_and_losses_little():
    student, teacher = zipf_logits(64, WHISPER)
    targets = topk_targets(teacher, 64)
    decoded = decode_topk(encode_topk(targets, WHISPER), 64, WHISPER)
    error = (decoded.log_probs - targets.log_probs).abs().max().item()
    assert 0.0030 < error <= 0.0039063 and -16 < targets.log_probs.min() < -8
    exact, stored = (topk_divergence(student, each, reduction="none") for each in (targets, decoded))
    assert exact.mean() > 0.1 and (stored - exact).abs().max() < 5e-4


def test_half_precision_does_not_shift_the_mean_loss():
    student, teacher = zipf_logits(20_000, 500)
    targets = topk_targets(teacher, 64)
    decoded = decode_topk(encode_topk(targets, 500), 64, 500)
    exact, stored = (topk_divergence(student, each, reduction="none").double() for each in (targets, decoded))
    assert exact.mean() > 0.1 and (stored - exact).mean().abs() < 1e-6


def test_rounded_targets_are_normalised_so_that_their_own_logits_give_no_loss():
    targets = decode_topk(encode_topk(topk_targets(zipf_logits(50, 200)[1], 8), 200), 8, 200)
    rest = (targets.log_tail - torch.tensor(192.0).log())[:, None].expand(-1, 200)
    student = rest.scatter(-1, targets.ids, targets.log_probs)
    loss = topk_divergence(student, targets, reduction="none")
    assert loss.abs().max() < 1e-6


def test_the_store_gives_targets_back_by_utterance(tmp_path):
    store, targets = written_store(tmp_path / "labels")
    assert store.header["topk"] == {"k": 3, "vocabulary": 40, "temperature": 1.0, "bytes_per_token": 16}
    for key, expected in targets.items():
        read = read_topk(store, key)
        assert torch.equal(read.ids, expected.ids)
        torch.testing.assert_close(read.log_tail, expected.log_tail, rtol=0, atol=0)
        torch.testing.assert_close(read.log_probs, expected.log_probs, rtol=0, atol=0.004)


def test_stores_without_the_targets_say_so(tmp_path):
    store, _ = written_store(tmp_path / "labels")
    with pytest.raises(LabelStoreError, match="holds no top-k targets of utterance 'c'"):
        read_topk(store, "c")
    other = create_store(tmp_path / "text", {"teacher": TEACHER, "targets": ["text"]})
    with pytest.raises(LabelStoreError, match=r"text keeps no top-k targets; its targets: \['text'\]"):
        read_topk(other, "a")


def test_damaged_records_are_refused_with_their_utterance(tmp_path):
    store, _ = written_store(tmp_path / "labels")
    store.write_shard([{"id": "cut"}], {topk_key("cut"): store.array(topk_key("a"))[:, :-1]})
    with pytest.raises(LabelStoreError, match=r"utterance 'cut': top-k records are \(6, 15\) .* \(tokens, 16\)"):
        read_topk(LabelStore(store.folder), "cut")


def test_records_of_another_size_type_or_vocabulary_are_refused():
    records = encode_topk(topk_targets(torch.randn(2, 40), 3), 40)
    with pytest.raises(ValueError, match=r"\(2, 16\) torch.uint8, but k=4 and a vocabulary of 40 ids need"):
        decode_topk(records, 4, 40)
    with pytest.raises(ValueError, match=r"\(32,\) torch.uint8, but k=3"):
        decode_topk(records.flatten(), 3, 40)
    with pytest.raises(ValueError, match=r"\(2, 16\) torch.float32, but k=3"):
        decode_topk(records.float(), 3, 40)
    records[1, 1] = 1  # high byte of an id
    with pytest.raises(ValueError, match=r"target id \d+ is not in the vocabulary of 40 ids"):
        decode_topk(records, 3, 40)


def test_targets_that_cannot_be_stored_are_refused():
    ids, log_probs, log_tail = topk_targets(torch.randn(2, 40), 3)
    with pytest.raises(ValueError, match=r"ids must be \(tokens, k\), got \(1, 2, 3\)"):
        encode_topk(TopK(ids[None], log_probs[None], log_tail[None]), 40)
    with pytest.raises(ValueError, match=r"log_probs \(2, 2\) and log_tail \(2,\); they must be"):
        encode_topk(TopK(ids, log_probs[:, :2], log_tail), 40)
    with pytest.raises(ValueError, match="target id 40 is not in the vocabulary of 40 ids"):
        encode_topk(TopK(torch.full_like(ids, 40), log_probs, log_tail), 40)
    with pytest.raises(ValueError, match="targets hold NaN"):
        encode_topk(TopK(ids, log_probs * torch.nan, log_tail), 40)
    for k in (0, 41):
        with pytest.raises(ValueError, match=f"k must be 1 to the vocabulary of 40 ids, got {k}"):
            bytes_per_token(k, 40)


def test_a_labels_targets_are_what_the_teacher_expects_after_each_of_its_tokens():
    model, states = tiny_whisper(decoder_layers=2), torch.randn(2, 1500, 16)
    labels = [[*TOKENS.prefix, 400, 401, TOKENS.end_of_text], [*TOKENS.prefix, TOKENS.end_of_text]]
    together = topk_of_labels(model, states, labels, TOKENS, 5)
    for row, (label, records) in enumerate(zip(labels, together, strict=True)):
        inputs = {"encoder_outputs": (states[row : row + 1],), "decoder_input_ids": torch.tensor([label[:-1]])}
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0]
        expected, found = topk_targets(logits, 5), decode_topk(records, 5, WHISPER)
        assert len(found.ids) == len(label) - 1
        assert torch.equal(found.ids, expected.ids)
        torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.log_tail, expected.log_tail, rtol=1e-4, atol=1e-4)


def test_a_store_keeps_targets_beside_encoder_states(tiny_teacher, tone_manifest, tmp_path):
    targets, decoding = ("text", "encoder_states", "topk"), DecodingConfig(max_new_tokens=6)
    store = label_manifest(tiny_teacher, tone_manifest, tmp_path / "labels", decoding=decoding, targets=targets)
    for row in store.rows():
        assert store.array(row["id"]).shape == (1500, 16)
        assert read_topk(store, row["id"]).ids.shape == (len(row["token_ids"]) - 1, 32)
    assert store.header["topk"] == {"k": 32, "vocabulary": WHISPER, "temperature": 1.0, "bytes_per_token": 132}


def test_a_batch_of_targets_is_padded_like_its_labels():
    first, second = topk_targets(torch.randn(3, 40), 2), topk_targets(torch.randn(5, 40), 2)
    batch = collate_topk([first, second], [4, 6], 7)
    assert batch["topk_ids"].shape == batch["topk_log_probs"].shape == (2, 7, 2)
    assert torch.equal(batch["topk_ids"][0, :3], first.ids) and not batch["topk_ids"][0, 3:].any()
    assert torch.equal(batch["topk_log_tail"][1, :5], second.log_tail)
    with pytest.raises(ValueError, match="utterance 1 of the batch has top-k targets of 5 tokens for a label of 8"):
        collate_topk([first, second], [4, 8], 7)
