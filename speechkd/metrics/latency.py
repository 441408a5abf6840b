"""How fast a decoder runs, measured so that models can be compared."""

import time

import torch
from torch import Tensor
from transformers import WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput


@torch.no_grad()
def decode_seconds_per_token(
    models: list[WhisperForConditionalGeneration], encoder_states: Tensor, *, num_tokens: int = 32, num_rounds: int = 5
) -> list[float]:
    """Time of greedy decoding per step, the models taking turns so that a busy machine slows all of them alike.

    The first round is not counted. Every model decodes exactly `num_tokens` tokens for each clip.

    Args:
        models: on one device.
        encoder_states: (batch, frames, dim).
        num_tokens: decoded tokens per clip.
        num_rounds: counted rounds; each model's median is returned.

    Returns:
        Seconds per decoding step of the whole batch, one per model.
    """
    times: list[list[float]] = [[] for _ in models]
    for round_number in range(num_rounds + 1):
        for model, seconds in zip(models, times, strict=True):
            started = _now(encoder_states.device)
            model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoder_states),
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                do_sample=False,
                num_beams=1,
            )
            if round_number:
                seconds.append((_now(encoder_states.device) - started) / num_tokens)
    return [sorted(seconds)[len(seconds) // 2] for seconds in times]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
