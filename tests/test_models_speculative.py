import pytest
import torch
from conftest import tiny_whisper
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration

from speechkd.data.collate import WhisperTokens
from speechkd.models import speculative
from speechkd.models.speculative import load_assistant, speculate, speculative_decode
from speechkd.models.whisper import greedy_decode, student_from_teacher
from speechkd.teachers import load_processor, load_whisper

END = -1  # the toy model never ends by itself


def next_token(token_ids: list[int]) -> int:
    """A toy language model: the next token hangs on the last two."""
    return (7 * token_ids[-1] + 3 * token_ids[-2] + 1) % 101


def speculate_toy(wrong_every: int | None) -> tuple:
    """20 tokens with drafts of 5 that are wrong at every n-th position; `wrong_every=None` drafts without error."""
    prefix = [1, 2]

    def draft(token_ids, count):
        ids = list(token_ids)
        for _ in range(count):
            is_wrong = wrong_every is not None and (len(ids) - len(prefix)) % wrong_every == 0
            ids.append(next_token(ids) + is_wrong)
        return ids[len(token_ids) :]

    def verify(token_ids, drafted):
        ids = [*token_ids, *drafted]
        return [next_token(ids[: len(token_ids) + i]) for i in range(len(drafted) + 1)]

    return speculate(draft, verify, prefix, end_of_text=END, num_draft_tokens=5, max_new_tokens=20)


@pytest.mark.parametrize(("wrong_every", "num_steps", "num_accepted"), [(None, 4, 17), (4, 6, 15), (1, 20, 0)])
def test_the_text_is_the_teachers_whatever_is_drafted_and_steps_are_saved(wrong_every, num_steps, num_accepted):
    expected = [1, 2]
    while len(expected) < 22:
        expected.append(next_token(expected))
    result = speculate_toy(wrong_every)
    assert result.token_ids == expected and not result.finished
    assert (result.num_steps, result.num_accepted) == (num_steps, num_accepted)


def test_nothing_follows_the_end_of_the_text():
    text = [5, 6, 9, 7, 8]  # 9 ends it, and the drafts run on

    def verify(token_ids, drafted):
        return text[len(token_ids) - 1 : len(token_ids) + len(drafted)]

    result = speculate(
        lambda ids, count: text[len(ids) - 1 :][:count],
        verify,
        [1],
        end_of_text=9,
        num_draft_tokens=4,
        max_new_tokens=20,
    )
    assert result.token_ids == [1, 5, 6, 9] and result.finished
    assert (result.num_steps, result.num_drafted, result.num_accepted) == (1, 4, 3)


@pytest.fixture(scope="module")
def teacher(tiny_teacher) -> WhisperForConditionalGeneration:
    """With larger weights, so that its greedy text is no repetition of one token, and each layer matters."""
    model = load_whisper(tiny_teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight.normal_()
        model.model.decoder.embed_positions.weight.normal_(std=3)
        for weight in model.model.decoder.layers.parameters():
            weight.normal_(std=0.4)
    return model


@pytest.fixture(scope="module")
def student_folder(teacher, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("student")
    student_from_teacher(teacher, decoder_layers=2).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokens(tiny_teacher) -> WhisperTokens:
    return WhisperTokens.from_tokenizer(load_processor(tiny_teacher).tokenizer)


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 5])
def test_a_students_drafts_leave_the_teachers_greedy_text_as_it_is(teacher, student_folder, tokens, num_draft_tokens):
    assistant = load_assistant(student_folder, teacher)
    accepted = rejected = 0
    for seed in range(3):
        states = torch.randn(1, 1500, 16, generator=torch.Generator().manual_seed(seed))
        expected = greedy_decode(teacher, states, tokens, max_new_tokens=20)[0]
        result = speculative_decode(
            teacher, assistant, states, tokens, num_draft_tokens=num_draft_tokens, max_new_tokens=20
        )
        assert result.token_ids == expected.token_ids and result.finished == expected.finished
        assert len(set(result.token_ids[len(tokens.prefix) :])) > 2
        accepted += result.num_accepted
        rejected += result.num_drafted - result.num_accepted
    assert num_draft_tokens < 5 or (accepted and rejected)  # caches were both carried on and cropped


def test_an_assistant_that_hears_no_silence_changes_no_text(teacher, student_folder, tokens):
    assistant = load_assistant(student_folder, teacher)
    states = torch.randn(1, 1500, 16, generator=torch.Generator().manual_seed(0))
    heard = []
    hook = assistant.model.decoder.register_forward_hook(
        lambda _, __, kwargs, ___: heard.append(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    results = [
        speculative_decode(teacher, assistant, states, tokens, max_new_tokens=20, duration_seconds=seconds)
        for seconds in (30.0, 8.6)
    ]
    hook.remove()
    assert results[0].token_ids == results[1].token_ids and set(heard) == {1500, 455}


def test_a_draft_ends_with_the_token_that_its_assistant_doubts(teacher, student_folder, tokens, monkeypatch):
    assistant = load_assistant(student_folder, teacher)
    states = torch.randn(1, 1500, 16, generator=torch.Generator().manual_seed(0))
    doubtful, sure = [], []
    for threshold, results in ((1.1, doubtful), (0.0, sure)):
        monkeypatch.setattr(speculative, "MIN_DRAFT_PROBABILITY", threshold)
        results.append(speculative_decode(teacher, assistant, states, tokens, num_draft_tokens=5, max_new_tokens=20))
    assert doubtful[0].token_ids == sure[0].token_ids
    assert doubtful[0].num_drafted <= doubtful[0].num_steps  # one token a step, none where no room is left
    assert sure[0].num_drafted > sure[0].num_steps


def test_a_token_suppressed_at_the_start_only_is_suppressed_there_as_in_generate(teacher, student_folder, tokens):
    states = torch.randn(1, 1500, 16, generator=torch.Generator().manual_seed(0))
    plain = greedy_decode(teacher, states, tokens, max_new_tokens=8)[0].token_ids
    kept = teacher.generation_config.begin_suppress_tokens
    teacher.generation_config.begin_suppress_tokens = [*kept, plain[len(tokens.prefix)]]
    try:
        expected = greedy_decode(teacher, states, tokens, max_new_tokens=8)[0].token_ids
        assistant = load_assistant(student_folder, teacher)
        result = speculative_decode(teacher, assistant, states, tokens, max_new_tokens=8)
    finally:
        teacher.generation_config.begin_suppress_tokens = kept
    assert plain != expected and result.token_ids == expected


def test_the_assistant_holds_no_encoder_and_no_second_float_head(teacher, student_folder):
    assistant = load_assistant(student_folder, teacher)
    assert not [
        name for name, _ in assistant.named_modules() if "encoder." in f"{name}." and "encoder_attn" not in name
    ]
    assert assistant.proj_out.weight().dtype == torch.qint8
    assert len(assistant.model.decoder.layers) == 2


def test_in_half_precision_and_from_several_files_the_assistant_stays_as_it_was_trained(tiny_teacher, tokens, tmp_path):
    teacher = load_whisper(tiny_teacher, dtype=torch.bfloat16)
    student_from_teacher(teacher, decoder_layers=1).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assistant = load_assistant(str(tmp_path), teacher)
    assert assistant.proj_out.weight.dtype == torch.bfloat16
    states = torch.randn(1, 1500, 16, dtype=torch.bfloat16)
    result = speculative_decode(teacher, assistant, states, tokens, max_new_tokens=4)
    assert result.token_ids[: len(tokens.prefix)] == list(tokens.prefix) and result.num_accepted <= result.num_drafted


def test_batches_are_refused(teacher, student_folder, tokens):
    with pytest.raises(ValueError, match="one clip at a time, got 2; .* greedy_decode"):
        speculative_decode(teacher, load_assistant(student_folder, teacher), torch.randn(2, 1500, 16), tokens)


def test_an_assistant_of_another_vocabulary_is_refused_with_both_sizes(teacher, tmp_path):
    tiny_whisper(decoder_layers=1, vocab_size=51866).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="51866 tokens and the teacher 51865"):
        load_assistant(str(tmp_path), teacher)


@pytest.mark.parametrize("change", ["value", "missing", "absent"])
def test_an_assistant_with_another_encoder_is_refused(teacher, student_folder, tmp_path, change):
    student = student_from_teacher(teacher, decoder_layers=1)
    student.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if change == "value":
        weights["model.encoder.layers.1.fc1.bias"][3] += 1e-3
    elif change == "missing":
        del weights["model.encoder.layers.1.fc1.bias"]
    else:
        weights = {name: weight for name, weight in weights.items() if "model.encoder." not in name}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="is not the teacher's .* encoder states of its own"):
        load_assistant(str(tmp_path), teacher)


def test_a_folder_without_weights_is_refused(teacher, tmp_path):
    teacher.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be loaded; it needs config.json and its weights"):
        load_assistant(str(tmp_path), teacher)
