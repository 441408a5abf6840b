import pytest
import torch
from conftest import TOKENS, tiny_whisper
from transformers import WhisperConfig, WhisperForConditionalGeneration

from speechkd.models.whisper import (
    choose_layers,
    decoder_layer_states,
    decoder_states,
    encode,
    encoders_equal,
    freeze_student,
    greedy_decode,
    resolve_layers,
    sample_tokens,
    student_from_teacher,
)


@pytest.mark.parametrize(
    ("teacher", "student", "layers"),
    [
        (32, 1, [31]),
        (32, 2, [0, 31]),
        (32, 3, [0, 15, 31]),
        (32, 4, [0, 10, 20, 31]),
        (32, 8, [0, 4, 8, 13, 17, 22, 26, 31]),
        (32, 16, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 31]),
        (24, 2, [0, 23]),
        (12, 2, [0, 11]),
        (12, 4, [0, 3, 7, 11]),
        (6, 3, [0, 2, 5]),
        (4, 1, [3]),
    ],
)
def test_layers_are_spaced_as_in_the_published_checkpoints(teacher, student, layers):
    assert choose_layers(teacher, student) == layers


def test_listed_layers_count_from_the_end_where_negative():
    assert resolve_layers(6, 2, [0, -1]) == [0, 5]


@pytest.mark.parametrize(
    ("count", "layers", "message"),
    [(2, [0], "1 layers are listed"), (2, [0, 6], "different"), (2, [5, -1], "different")],
)
def test_wrong_layer_lists_are_refused(count, layers, message):
    with pytest.raises(ValueError, match=message):
        resolve_layers(6, count, layers)


def test_a_student_deeper_than_its_teacher_is_refused():
    with pytest.raises(ValueError, match="8 layers cannot be cut from a teacher of 6"):
        choose_layers(6, 8)


LARGE = {"d_model": 1280, "encoder_attention_heads": 20, "decoder_attention_heads": 20, "vocab_size": 51865}
LARGE |= {"encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120, "encoder_layers": 32, "decoder_layers": 32}
MEDIUM_EN = LARGE | {"d_model": 1024, "encoder_attention_heads": 16, "decoder_attention_heads": 16, "vocab_size": 51864}
MEDIUM_EN |= {"encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "encoder_layers": 24, "decoder_layers": 24}
SMALL_EN = LARGE | {"d_model": 768, "encoder_attention_heads": 12, "decoder_attention_heads": 12, "vocab_size": 51864}
SMALL_EN |= {"encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "encoder_layers": 12, "decoder_layers": 12}
LARGE_V3 = LARGE | {"vocab_size": 51866, "num_mel_bins": 128}


def meta_whisper(settings: dict) -> WhisperForConditionalGeneration:
    with torch.device("meta"):
        return WhisperForConditionalGeneration(WhisperConfig(**settings))


@pytest.mark.parametrize(
    ("teacher", "encoder_layers", "decoder_layers", "parameters"),
    [
        (LARGE, 32, 32, 1_543_304_960),
        (LARGE, 32, 2, 756_220_160),
        (LARGE, 16, 2, 441_401_600),
        (LARGE_V3, 32, 2, 756_405_760),
        (LARGE_V3, 32, 4, 808_878_080),
        (MEDIUM_EN, 24, 2, 394_375_168),
        (SMALL_EN, 12, 4, 166_132_224),
    ],
)
def test_parameter_counts_are_those_of_the_published_models(teacher, encoder_layers, decoder_layers, parameters):
    settings = teacher | {"encoder_layers": encoder_layers, "decoder_layers": decoder_layers}
    assert meta_whisper(settings).num_parameters() == parameters


def test_frozen_encoder_and_positions_leave_the_published_number_of_trainable_parameters():
    student = meta_whisper(LARGE | {"decoder_layers": 2})
    freeze_student(student)
    assert sum(p.numel() for p in student.parameters() if p.requires_grad) == 118_862_080
    assert student.model.decoder.num_parameters() == 119_435_520
    assert sum(p.numel() for p in student.model.decoder.layers[0].parameters()) == 26_236_160


def test_a_student_copies_the_chosen_layers_and_everything_outside_them():
    teacher = tiny_whisper(decoder_layers=4)
    student = student_from_teacher(teacher, decoder_layers=2)
    theirs, ours = teacher.state_dict(), student.state_dict()
    for name, weight in ours.items():
        source = name.replace("decoder.layers.1.", "decoder.layers.3.")
        assert torch.equal(weight, theirs[source]), name
    assert encoders_equal(teacher, student)
    assert student.config.decoder_layers == 2 and teacher.config.decoder_layers == 4


def test_a_student_of_all_layers_answers_as_its_teacher():
    teacher = tiny_whisper(decoder_layers=3)
    student = student_from_teacher(teacher, decoder_layers=None).eval()
    inputs = {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": torch.tensor([[50258, 50259, 50359]])}
    with torch.no_grad():
        torch.testing.assert_close(student(**inputs).logits, teacher(**inputs).logits, rtol=0, atol=0)


def test_decoder_states_and_the_head_give_the_models_logits():
    model = tiny_whisper(decoder_layers=1)
    inputs = {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": torch.tensor([[50258, 50259, 50359]])}
    with torch.no_grad():
        states, head = decoder_states(model, **inputs)
        assert states.shape == (1, 3, 16)
        torch.testing.assert_close(states @ head.T, model(**inputs).logits)
        with pytest.raises(AttributeError):  # an error inside leaves the head in its place
            decoder_states(model, decoder_input_ids=inputs["decoder_input_ids"])
        assert model(**inputs).logits.shape == (1, 3, 51865)


def test_alignment_heads_never_point_at_a_missing_layer():
    teacher = tiny_whisper(decoder_layers=4)
    teacher.generation_config.alignment_heads = [[1, 0], [3, 1], [2, 0]]
    teacher.generation_config.forced_decoder_ids = [[1, 2]]
    student = student_from_teacher(teacher, decoder_layers=2)
    assert student.generation_config.alignment_heads == [[1, 1]]
    assert student.generation_config.forced_decoder_ids is None
    teacher.generation_config.alignment_heads = [[1, 0]]
    assert student_from_teacher(teacher, decoder_layers=2).generation_config.alignment_heads == [[1, 0], [1, 1]]


def test_mean_logprob_is_that_of_the_decoded_tokens():
    model = tiny_whisper(decoder_layers=1)
    states = torch.randn(2, 1500, 16)
    decoded = greedy_decode(model, states, TOKENS, max_new_tokens=5)
    for row, result in enumerate(decoded):
        text_ids = result.token_ids[len(TOKENS.prefix) :]
        inputs = torch.tensor([result.token_ids[:-1]])
        with torch.no_grad():
            logits = model(encoder_outputs=(states[row : row + 1],), decoder_input_ids=inputs).logits[0, 3:]
        logits[:, TOKENS.no_timestamps + 1 :] = -torch.inf  # no timestamps were asked for
        expected = logits.log_softmax(-1).gather(1, torch.tensor(text_ids)[:, None]).mean().item()
        assert result.mean_logprob == pytest.approx(expected, abs=1e-4)
        assert not result.finished and len(text_ids) == 5


def test_a_student_that_wants_to_emit_timestamps_is_kept_to_text():
    model = tiny_whisper(decoder_layers=1)
    with torch.no_grad():
        model.proj_out.weight[TOKENS.no_timestamps + 1 :] += 5 * model.model.decoder.layer_norm.bias.sign() + 1.0
        model.model.decoder.layer_norm.bias += 1.0  # every timestamp now has by far the highest logit
    states = torch.randn(2, 1500, 16)
    start = torch.full((2, 1), TOKENS.start_of_transcript)
    with torch.no_grad():
        favourite = model(encoder_outputs=(states,), decoder_input_ids=start).logits[:, -1].argmax(dim=-1)
    assert (favourite > TOKENS.no_timestamps).all()
    for result in greedy_decode(model, states, TOKENS, max_new_tokens=4):
        assert max(result.token_ids) <= TOKENS.no_timestamps


def test_listed_encoder_layers_are_the_ones_that_are_kept():
    teacher = tiny_whisper(decoder_layers=2)
    student = student_from_teacher(teacher, encoder_layers_numbers=[-1])
    kept, source = student.model.encoder.layers, teacher.model.encoder.layers[1]
    assert len(kept) == student.config.encoder_layers == student.config.num_hidden_layers == 1
    assert all(torch.equal(weight, source.state_dict()[name]) for name, weight in kept[0].state_dict().items())
    with pytest.raises(ValueError, match=r"layers \[2\] must name different layers of a teacher of 2"):
        student_from_teacher(teacher, encoder_layers_numbers=[2])


def test_a_frozen_decoder_leaves_the_embedding_that_is_the_head_too():
    student = tiny_whisper(decoder_layers=2)
    freeze_student(student, decoder=True)
    assert [name for name, weight in student.named_parameters() if weight.requires_grad] == [
        "model.decoder.embed_tokens.weight"
    ]
    freeze_student(student := tiny_whisper(decoder_layers=1), encoder=False, embed_positions=False)
    assert all(weight.requires_grad for name, weight in student.named_parameters() if "encoder.embed" not in name)


def test_layer_states_are_those_that_the_model_reports():
    model = tiny_whisper(decoder_layers=3)
    inputs = {
        "encoder_outputs": (torch.randn(2, 1500, 16),),
        "decoder_input_ids": torch.tensor([[50258, 50259]] * 2),
    }
    with torch.no_grad():
        states, head, layers = decoder_layer_states(model, [1, 3], **inputs)
        output = model(**inputs, output_hidden_states=True, use_cache=False)
    assert layers.shape == (2, 2, 2, 16)
    torch.testing.assert_close(layers[:, 0], output.decoder_hidden_states[1])
    torch.testing.assert_close(layers[:, 1], states)
    torch.testing.assert_close(states @ head.T, output.logits)


def test_samples_follow_the_models_distribution_and_stop_at_the_end_of_text():
    model, states = tiny_whisper(decoder_layers=1), torch.randn(1, 3, 16)
    favourites = torch.tensor([7, 9, TOKENS.end_of_text])
    prompt = torch.tensor([TOKENS.prefix])
    with torch.no_grad():
        model.proj_out.weight.zero_()
        # the same state at every position, and three ids of logits log 6, log 3 and log 1, far above all others
        model.model.decoder.layer_norm.weight.zero_()
        model.model.decoder.layer_norm.bias.fill_(1.0)
        model.proj_out.weight[:] = -50 / 16
        model.proj_out.weight[favourites] = torch.tensor([6.0, 3.0, 1.0]).log()[:, None] / 16
    many = {"encoder_states": states.expand(300, -1, -1), "prompt": prompt.expand(300, -1)}
    generator = torch.Generator().manual_seed(0)
    ids = sample_tokens(model, **many, end_of_text=TOKENS.end_of_text, max_new_tokens=2, generator=generator)
    assert (ids[:, :4] == prompt).all() and ids.shape == (300, 6)
    shares = [(ids[:, 4] == token).float().mean().item() for token in favourites]
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.07)
    ended = (ids[:, 4:] == TOKENS.end_of_text).int().cumsum(dim=1) > 0
    assert (ids[:, 4:][ended] == TOKENS.end_of_text).all()
    greedy = sample_tokens(
        model.train(), states, prompt, end_of_text=TOKENS.end_of_text, max_new_tokens=3, temperature=0
    )
    assert greedy[0, 4:].tolist() == [7, 7, 7]
    assert model.model.decoder.training  # as before


def test_greedy_samples_of_a_batch_are_those_of_full_passes():
    model, states = tiny_whisper(decoder_layers=2), torch.randn(2, 1500, 16)
    ids = prompt = torch.tensor([TOKENS.prefix] * 2)
    for _ in range(4):
        with torch.no_grad():
            logits = model(encoder_outputs=(states,), decoder_input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    found = sample_tokens(model, states, prompt, end_of_text=TOKENS.end_of_text, max_new_tokens=4, temperature=0)
    assert torch.equal(found, ids)


def test_encoder_states_of_a_batch_are_those_of_its_clips_alone():
    model = tiny_whisper()
    features = torch.randn(3, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    states = encode(model, features)
    with torch.no_grad():
        torch.testing.assert_close(states, model.model.encoder(features).last_hidden_state)
    assert torch.equal(states[2:], encode(model, features[2:])) and not states.requires_grad
