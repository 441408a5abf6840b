"""Predictor, joiner and loss of a transducer, Graves 2012, https://arxiv.org/abs/1211.3711.

The predictor sees the last two symbols alone, Ghodsi et al. 2020, as in the recipe that MVQ was published with.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

CONTEXT_SYMBOLS = 2  # that the predictor sees


class Predictor(nn.Module):
    """A transducer's predictor without recurrence: an embedding and a convolution over the last symbols.

    Its interface is that of torchaudio's, for `torchaudio.models.RNNTBeamSearch`.

    Args:
        num_classes: symbols and the blank, which comes last and also stands before the first symbol.
        width: of its output.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.blank = num_classes - 1
        self.embedding = nn.Embedding(num_classes, width)
        self.convolution = nn.Conv1d(width, width, CONTEXT_SYMBOLS, groups=width)

    def forward(
        self, input: Tensor, lengths: Tensor, state: list[list[Tensor]] | None
    ) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
        """Outputs (batch, symbols, width), the lengths, and the state for the symbols after these.

        Args:
            input: classes, (batch, symbols), int64.
            lengths: of each row, (batch,).
            state: of the call before; None at the beginning.
        """
        before = input.new_full((len(input), CONTEXT_SYMBOLS - 1), self.blank) if state is None else state[0][0]
        joined = torch.cat([before, input], dim=1)
        embedded = self.embedding(joined).transpose(1, 2)
        output = F.relu(self.convolution(embedded)).transpose(1, 2)
        return output, lengths, [[joined[:, joined.shape[1] - CONTEXT_SYMBOLS + 1 :]]]


class Joiner(nn.Module):
    """Logits of a transducer out of a frame and what was said before it.

    Args:
        width: of both.
        num_classes: symbols and the blank.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.output = nn.Linear(width, num_classes)

    def forward(
        self, source_encodings: Tensor, source_lengths: Tensor, target_encodings: Tensor, target_lengths: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (batch, frames, symbols, classes), and the lengths as they came.

        Args:
            source_encodings: (batch, frames, width).
            source_lengths: (batch,).
            target_encodings: (batch, symbols, width).
            target_lengths: (batch,).
        """
        joint = torch.tanh(source_encodings[:, :, None] + target_encodings[:, None])
        return self.output(joint), source_lengths, target_lengths


def transducer_loss(
    predictor: Predictor, joiner: Joiner, source: Tensor, num_frames: Tensor, targets: Sequence[Tensor]
) -> Tensor:
    """-log p(target | clip), summed over clips; the joiner's logits and the loss are float32.

    The blank is the last class here, where torchaudio's beam search looks for it, so symbol n is class n - 1. All
    logits are held, batch * frames * (symbols + 1) * classes numbers.

    Args:
        predictor: of the symbols.
        joiner: of both.
        source: projected states of the encoder, (batch, frames, width).
        num_frames: of each clip, (batch,), int64.
        targets: numbers of the symbols of each clip, from 1, (symbols,), int64.

    Returns:
        0-dim, float32.

    Raises:
        ValueError: a target is empty or holds no symbol, or numbers do not fit.
    """
    blank = predictor.blank
    if len(targets) != len(source) or num_frames.shape != (len(source),):
        raise ValueError(
            f"source {tuple(source.shape)}, num_frames {tuple(num_frames.shape)} and {len(targets)} targets do not "
            "fit; give one length and one target for each clip"
        )
    for row, target in enumerate(targets):
        if not len(target) or int(target.min()) < 1 or int(target.max()) > blank:
            raise ValueError(
                f"target {row} is {target.tolist()}; it must hold one symbol or more, with numbers 1 to {blank}"
            )
    device = source.device
    lengths = torch.tensor([len(target) for target in targets])
    classes = pad_sequence([target.cpu() - 1 for target in targets], batch_first=True).to(device)
    predicted, _, _ = predictor(F.pad(classes, (1, 0), value=blank), lengths + 1, None)
    with torch.autocast(device.type, enabled=False):
        logits, _, _ = joiner(source[:, : int(num_frames.max())].float(), num_frames, predicted.float(), lengths)
        return torchaudio.functional.rnnt_loss(
            logits,
            classes.int(),
            num_frames.to(device).int(),
            lengths.to(device).int(),
            blank=blank,
            reduction="sum",
        )
