"""The teacher's likeliest ids at every position of its own labels, which stand for its decoder in training."""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import WhisperForConditionalGeneration

from speechkd.data.collate import WhisperTokens
from speechkd.labels.decoder_state_labels import states_of_labels
from speechkd.labels.topk_records import encode_topk
from speechkd.losses.sparse import topk_targets

# At temperature 2 some 70 % of whisper-base's probability lies outside its 128 likeliest ids, at 1 it is 1 % outside
# 32: so targets are made, and trained on, at 1.
TOPK = 32


@torch.no_grad()
def topk_of_labels(
    model: WhisperForConditionalGeneration,
    encoder_states: Tensor,
    token_id_sequences: list[list[int]],
    tokens: WhisperTokens,
    k: int = TOPK,
) -> list[Tensor]:
    """Records of what a teacher expects after each token of labels, fed to it as a student gets them.

    Args:
        model: the teacher.
        encoder_states: last hidden states of its encoder, (batch, frames, dim).
        token_id_sequences: whole labels, one per clip, from `<|startoftranscript|>` on.
        tokens: of the model's vocabulary.
        k: ids kept of each distribution, at temperature 1.

    Returns:
        For each label of n tokens its n - 1 records of `topk_records`, (n - 1, bytes), uint8, on the CPU.

    Raises:
        ValueError: k is not 1 to the vocabulary, a label is empty or too long, or a logit is NaN.
    """
    states, head = states_of_labels(model, encoder_states, token_id_sequences, tokens)
    # one label at a time: the logits of a whole batch would be the largest tensor of all
    return [encode_topk(topk_targets(F.linear(row, head), k), model.config.vocab_size) for row in states]
