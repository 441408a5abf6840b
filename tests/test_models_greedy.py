import pytest
import torch
from conftest import TOKENS
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from speechkd.models.greedy import greedy_tokens
from speechkd.teachers import load_whisper

FIRST_TIMESTAMP = TOKENS.no_timestamps + 1
MAX_NEW_TOKENS = 30


@pytest.fixture(scope="module")
def model(tiny_teacher):
    """Random, but left with few tokens to choose from, so that clips end after different numbers of them."""
    model = load_whisper(tiny_teacher)
    allowed = {*range(500, 503), TOKENS.end_of_text, *range(FIRST_TIMESTAMP, 51865)}
    model.generation_config.suppress_tokens = [token for token in range(51865) if token not in allowed]
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight *= 30  # the head is tied: logits far apart, so rounding decides nothing
        model.model.decoder.embed_positions.weight *= 30
        for layer in model.model.decoder.layers:  # what is heard must matter
            layer.encoder_attn.v_proj.weight *= 5
            layer.encoder_attn.out_proj.weight *= 5
    return model


@pytest.fixture(scope="module")
def states():
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(16, 1, 16, generator=generator) + torch.randn(16, 1500, 16, generator=generator)


class NoTimestamps(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, FIRST_TIMESTAMP:] = -torch.inf
        return scores


def generated(model, states, timestamps: bool) -> list[list[int]]:
    """Tokens of transformers' own loop, up to the first end token."""
    sequences = model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        logits_processor=LogitsProcessorList([] if timestamps else [NoTimestamps()]),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        return_timestamps=timestamps,
        force_unique_generate_call=True,
        return_dict_in_generate=True,
        language="en",
        task="transcribe",
    ).sequences[:, len(TOKENS.prefix) - timestamps :]
    end = TOKENS.end_of_text
    return [ids[: ids.index(end) + 1] if end in ids else ids for ids in sequences.tolist()]


@pytest.mark.parametrize("timestamps", [False, True])
def test_tokens_are_those_of_transformers_generate(model, states, timestamps):
    results = greedy_tokens(model, states, TOKENS, max_new_tokens=MAX_NEW_TOKENS, timestamps=timestamps)
    expected = generated(model, states, timestamps)
    assert [result.token_ids for result in results] == expected
    assert len({len(ids) for ids in expected}) > 2  # clips left the batch one after the other
    assert any(token >= FIRST_TIMESTAMP for ids in expected for token in ids) == timestamps


def test_clips_alone_are_decoded_as_in_a_batch(model, states):
    together = greedy_tokens(model, states, TOKENS, max_new_tokens=MAX_NEW_TOKENS)
    for row, result in enumerate(together):
        (alone,) = greedy_tokens(model, states[row : row + 1], TOKENS, max_new_tokens=MAX_NEW_TOKENS)
        assert alone.token_ids == result.token_ids
        assert alone.logprobs == pytest.approx(result.logprobs, abs=1e-4)


def test_finished_clips_leave_the_batch(model, states):
    batch_sizes = []
    handle = model.model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: batch_sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    results = greedy_tokens(model, states, TOKENS, max_new_tokens=MAX_NEW_TOKENS)
    handle.remove()
    assert batch_sizes[0] == 16 and batch_sizes[-1] < 12
    lengths = [len(result.token_ids) for result in results]
    for step, size in enumerate(batch_sizes):  # less than a quarter of a batch is finished clips
        assert sum(length > step for length in lengths) > 0.75 * size


def test_no_speech_is_judged_after_the_start_token_alone(model, states):
    start = torch.full((len(states), 1), TOKENS.start_of_transcript)
    with torch.no_grad():
        logits = model(encoder_outputs=(states,), decoder_input_ids=start).logits[:, 0]
    expected = logits.softmax(dim=-1)[:, TOKENS.no_speech].tolist()
    results = greedy_tokens(model, states, TOKENS, max_new_tokens=1)
    assert [result.no_speech_prob for result in results] == pytest.approx(expected, rel=1e-3, abs=1e-8)
