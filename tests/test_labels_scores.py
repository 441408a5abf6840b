import math

import numpy as np
import pytest
import torch
from conftest import tiny_whisper
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from speechkd.labels.scores import (
    all_caps,
    label_cer,
    label_wer,
    language_model_nll,
    length_deviations,
    mean_entropy,
    normalize_label,
    proxy_wer,
    speech_text_cosine,
    speech_text_scores,
    token_entropies,
    whisper_label_entropy,
)

HINDI = "हिन्दी में"
WORDS = ["<s>", "</s>", "<unk>", "one", "two", "three", "four"]


def word_tokenizer(**special_tokens):
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def tiny_language_model(context=16):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS), n_positions=context, n_embd=8, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(30)  # far from uniform
    return model


@pytest.mark.parametrize(
    ("normalizer", "text", "expected"),
    [
        ("basic", "<|startoftranscript|><|en|><|0.00|> HELLO WORLD.<|endoftext|>", "hello world"),
        ("keep_marks", "<|startoftranscript|><|hi|><|0.00|> HELLO WORLD.", "hello world"),
        ("arabic", "<|startoftranscript|><|ar|><|0.00|> مرحبا<|2.00|>", "مرحبا"),
        ("basic", HINDI, "ह न द म"),  # the trap: marks become spaces
        ("keep_marks", HINDI, HINDI),
        ("keep_marks", "क्\u200dष ठीक।", "क्ष ठीक"),
        ("keep_marks", "我爱NLP，真的", "我 爱 nlp 真 的"),
        ("keep_marks", "ที่นี่ OK", "ที่ นี่ ok"),
        ("keep_marks", "コーヒー", "コ ー ヒ ー"),
        ("keep_marks", "مُحَمَّد", "مُحَمَّد"),
        ("arabic", "مُحَمَّد", "محمد"),
        ("arabic", "أإآٱ", "اااا"),
        ("arabic", "عندي ٢٥٪ و 30% hello!", "عندي 25 و 30%"),
        ("none", "  Keep  This! ", "Keep This!"),
        ("english", "twenty-one colours", "21 colors"),
    ],
)
def test_normalisers(normalizer, text, expected):
    assert normalize_label(text, normalizer) == expected


def test_unknown_normaliser_is_refused():
    with pytest.raises(ValueError, match="unknown normalizer 'hindi'; choose one of english.*keep_marks, arabic"):
        normalize_label("a", "hindi")


def test_basic_wer_exaggerates_hindi_errors_and_marks_keep_the_word_count():
    reference, label = "यह हिन्दी में है", "यह हिन्दी मे है"
    assert label_wer(reference, label, "keep_marks") == 25.0  # one of four words
    assert label_wer("की", "का", "keep_marks") == 100.0
    assert label_wer("की", "का", "basic") == 0.0  # the vowel sign, all of the difference, was deleted


def test_vowel_signs_that_arabic_may_leave_out_are_errors_only_where_marks_are_kept():
    assert label_wer("محمد هنا", "مُحَمَّد هنا", "arabic") == 0.0
    assert label_wer("محمد هنا", "مُحَمَّد هنا", "keep_marks") == 50.0
    assert label_wer("محمد هنا", "مُحَمَّد هنا", "basic") == 200.0


def test_chinese_and_thai_errors_are_counted_by_character():
    assert label_wer("今天天气很好", "今天天汽很好", "basic") == 100.0  # the whole sentence is one word
    assert label_wer("今天天气很好", "今天天汽很好", "keep_marks") == pytest.approx(100 / 6)
    assert label_wer("วันนี้", "วันนี่", "keep_marks") == pytest.approx(100 / 3)  # three letters, the marks go with them


def test_cer_ignores_white_space_and_counts_vowel_signs():
    assert label_cer("今天 天气", "今天天气", "keep_marks") == 0.0
    assert label_cer("की", "का", "keep_marks") == 50.0
    assert label_cer("Good day!", "good bay", "basic") == pytest.approx(100 / 7)
    assert label_cer("", "a", "basic") is None
    assert label_cer("[noise]", "a", "basic") is None


@pytest.mark.parametrize("text", [HINDI, "<|ar|> مرحبا", "สวัสดี", "你好"])
def test_caseless_scripts_are_never_all_caps(text):
    assert not all_caps(text)


def test_proxy_wer_is_zero_for_equal_transcripts_and_measured_against_the_proxy():
    rows = [
        {"id": "same", "text": "All is well."},
        {"id": "loop", "text": "thank you thank you thank you"},
        {"id": "invented", "text": "thanks for watching"},
        {"id": "silent", "text": ""},
        {"id": "null", "text": None},
    ]
    proxies = [
        {"id": "null", "text": "a"},
        {"id": "silent", "text": "..."},
        {"id": "invented", "text": ""},
        {"id": "loop", "text": "thank you"},
        {"id": "same", "text": "all is well"},
    ]
    np.testing.assert_allclose(proxy_wer(rows, proxies, "basic"), [0, 200, 300, 0, np.nan])


def test_proxy_labels_must_cover_all_utterances():
    with pytest.raises(ValueError, match="lack 1 of 2 utterances, the first is 'b'; run `speechkd label` with"):
        proxy_wer([{"id": "a", "text": "x"}, {"id": "b", "text": "x"}], [{"id": "a", "text": "x"}], "basic")


def test_length_deviation_is_symmetric_around_the_median():
    texts = ["abcdef", "abc def", "a b c", "abcdefabcdef", "", None]
    values = length_deviations(texts, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(values, [0, 0, math.log(2), math.log(2), np.inf, np.nan])
    assert np.isnan(length_deviations(["", None], [1.0, 1.0])).all()


def test_length_deviation_takes_the_duration_into_account():
    np.testing.assert_allclose(length_deviations(["ab", "abcd", "ab"], [1.0, 2.0, 4.0]), [0, 0, math.log(4)])


def test_cosine_of_embeddings():
    speech = np.array([[1.0, 0.0], [1.0, 1.0], [3.0, 0.0], [0.0, 0.0]])
    text = torch.tensor([[5.0, 0.0], [1.0, 0.0], [-2.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(speech_text_cosine(speech, text), [1, math.sqrt(0.5), -1, np.nan])


def test_cosine_stays_between_minus_one_and_one():
    vectors = torch.randn(500, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float16)
    cosines = speech_text_cosine(vectors, vectors)
    assert cosines.max() <= 1.0 and cosines.min() > 0.999999


@pytest.mark.parametrize("text_shape", [(3, 8), (2, 9), (2, 8, 1)])
def test_embeddings_that_do_not_belong_together_are_refused(text_shape):
    with pytest.raises(ValueError, match=r"speech \(2, 8\) and text .* must both be \(rows, dim\)"):
        speech_text_cosine(np.ones((2, 8)), np.ones(text_shape))


def test_speech_and_text_are_encoded_in_batches_from_a_generator():
    texts = ["a", "bb", "ccc", "dddd", "eeeee"]
    batches = []

    def encode_speech(waveforms):
        batches.append(len(waveforms))
        return torch.stack([torch.tensor([float(len(waveform)), 1.0]) for waveform in waveforms])

    def encode_text(batch):
        return np.array([[len(text), 1.0] for text in batch])

    waveforms = (torch.zeros(len(text)) for text in texts)
    values = speech_text_scores(waveforms, texts, encode_speech, encode_text, batch_size=2)
    np.testing.assert_allclose(values, np.ones(5))
    assert batches == [2, 2, 1]
    with pytest.raises(ValueError, match="4 waveforms for 5 texts"):
        speech_text_scores([torch.zeros(1)] * 4, texts, encode_speech, encode_text, batch_size=2)
    with pytest.raises(ValueError, match="more waveforms than the 5 texts"):
        speech_text_scores([torch.zeros(1)] * 6, texts, encode_speech, encode_text, batch_size=2)


def test_entropy_of_the_published_example():
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    assert token_entropies(logits).item() == pytest.approx(0.801819, abs=1e-6)
    normalised = mean_entropy(logits[None, None], torch.ones(1, 1, dtype=torch.bool))
    assert normalised.item() == pytest.approx(0.729847, abs=1e-6)


def test_entropy_of_ruled_out_tokens_is_zero_not_nan():
    assert token_entropies(torch.tensor([0.0, -torch.inf, 0.0])).item() == pytest.approx(math.log(2))
    assert token_entropies(torch.tensor([0.0, -torch.inf])).item() == 0.0


def test_mean_entropy_leaves_masked_tokens_out():
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, True, False, False], [False, False, False, False]])
    values = mean_entropy(logits, mask)
    assert values[0].item() == pytest.approx(token_entropies(logits[0, :2]).mean().item() / math.log(7))
    assert math.isnan(values[1].item())
    assert mean_entropy(torch.zeros(1, 4, 7), mask[:1]).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"mask \(2, 3\) does not cover logits \(2, 4, 7\)"):
        mean_entropy(logits, mask[:, :3])


def test_label_entropy_of_a_padded_batch_equals_that_of_each_label_alone():
    model = tiny_whisper()
    model.model.decoder.layer_norm.weight.data.mul_(60)  # else all predictions are about uniform
    states = torch.randn(2, 1500, 16, generator=torch.Generator().manual_seed(0))
    labels = [[50258, 50259, 50359, 50363, 400, 401, 402, 50257], [50258, 50259, 50359, 50363, 500, 50257]]
    together = whisper_label_entropy(model, states, labels, num_prefix_tokens=4)
    for index, label in enumerate(labels):
        with torch.no_grad():
            logits = model(encoder_outputs=(states[index : index + 1],), decoder_input_ids=torch.tensor([label])).logits
        expected = token_entropies(logits[0, 3:-1]).mean() / math.log(51865)  # position 3 predicts the first word
        assert together[index].item() == pytest.approx(expected.item(), abs=1e-5)
        assert expected < 0.95
    from_store = whisper_label_entropy(model, states.half(), labels, num_prefix_tokens=4)
    torch.testing.assert_close(from_store, together, rtol=0, atol=1e-3)


def test_language_model_nll_equals_a_plain_loop_whatever_the_batch():
    model, tokenizer = tiny_language_model(), word_tokenizer(bos_token="<s>", eos_token="</s>")
    texts = ["one", "one two three four", "four four", "three one two", "two"]
    expected = []
    for text in texts:
        ids = torch.tensor([[0, *tokenizer.encode(text)]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(dim=-1)
        steps = [-logprobs[position, token].item() for position, token in enumerate(ids[0, 1:].tolist())]
        expected.append(sum(steps) / len(steps))
    assert np.ptp(expected) > 0.1
    for batch_size in (1, 2, 8):
        np.testing.assert_allclose(language_model_nll(texts, model, tokenizer, batch_size), expected, rtol=1e-5)


def test_language_model_nll_of_a_uniform_model_is_the_log_of_its_vocabulary():
    model = tiny_language_model()
    torch.nn.init.zeros_(model.transformer.wte.weight)
    values = language_model_nll(["one two", None, "", "four"], model, word_tokenizer(eos_token="</s>"))
    np.testing.assert_allclose(values, [math.log(7), np.nan, np.nan, math.log(7)], rtol=1e-6)


def test_language_model_reads_no_further_than_its_context():
    model, tokenizer = tiny_language_model(context=4), word_tokenizer(bos_token="<s>")
    long, cut = language_model_nll(["one two three four one two", "one two three"], model, tokenizer)
    assert long == pytest.approx(cut)


def test_the_token_that_separates_documents_precedes_a_text():
    model = tiny_language_model()
    plain = word_tokenizer(bos_token="<s>")
    separated = word_tokenizer(bos_token="<s>")
    separated.add_tokens(["<|endoftext|>"])
    model.resize_token_embeddings(len(separated))
    ids = torch.tensor([[len(WORDS), separated.convert_tokens_to_ids("two")]])
    with torch.no_grad():
        expected = -model(ids).logits[0, 0].log_softmax(dim=-1)[ids[0, 1]].item()
    assert language_model_nll(["two"], model, separated)[0] == pytest.approx(expected, rel=1e-5)
    assert language_model_nll(["two"], model, plain)[0] != pytest.approx(expected, rel=1e-2)


def test_language_model_without_start_token_is_refused():
    with pytest.raises(ValueError, match="has no bos_token and no eos_token"):
        language_model_nll(["one"], tiny_language_model(), word_tokenizer())
