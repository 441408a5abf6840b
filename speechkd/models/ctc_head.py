"""A CTC head on a speech encoder's frames: strings of symbols, such as letters, with a blank of their own.

A string is a list of symbols, each a text: letters have one character, and a symbol of several characters, such as the
name of a slot, is one symbol all the same.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from speechkd.models.probes import linear_heads
from speechkd.models.segue import SegueEncoder

BLANK = 0  # symbols are numbered from 1, so no symbol can be taken for it


class SegueForCTC(PreTrainedModel):
    """A SEGUE encoder and one linear head on its frames, before the mean over them and the map to the teacher's width.

    Args:
        encoder: becomes a part of this model.
        num_symbols: of the alphabet, without the blank.
        seed: of the head's first weights.

    Raises:
        ValueError: there is no symbol.
    """

    main_input_name = "waveforms"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, encoder: SegueEncoder, num_symbols: int, *, seed: int) -> None:
        if num_symbols < 1:
            raise ValueError(f"a CTC head needs one symbol or more, got {num_symbols}; look at the texts")
        super().__init__(encoder.config)
        self.encoder = encoder
        if encoder.projection is not None:
            encoder.projection.requires_grad_(False)  # no gradient reaches it
        self.head: Any = linear_heads(encoder.config.hidden_size, [num_symbols + 1], seed=seed)[0]
        encoder.set_last_ffn_dropout(True)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        pass  # encoder and head come with weights

    def forward(
        self, waveforms: Tensor | None = None, num_samples: Tensor | None = None, states: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (batch, frames, symbols + 1), float32, and the valid frames of each clip, (batch,), int64.

        Arguments are those of `SegueEncoder.forward`.
        """
        if num_samples is None:
            raise ValueError("num_samples is missing; give the length of each clip without its padding, (batch,)")
        frames, mask = self.encoder.frame_states(waveforms, num_samples, states)
        return self.head(frames.to(self.head.weight.dtype)).float(), mask.sum(dim=1)


def ctc_alphabet(strings: Sequence[Sequence[str]]) -> list[str]:
    """The symbols that occur, sorted; the first has number 1."""
    return sorted({symbol for string in strings for symbol in string})


def encode_symbols(strings: Sequence[Sequence[str]], alphabet: Sequence[str]) -> list[Tensor]:
    """Numbers of the symbols of each string, (symbols,), int64.

    Raises:
        ValueError: a symbol is not in the alphabet.
    """
    numbers = {symbol: index for index, symbol in enumerate(alphabet, start=BLANK + 1)}
    unknown = sorted({symbol for string in strings for symbol in string} - numbers.keys())
    if unknown:
        raise ValueError(
            f"symbols {unknown} are not among the {len(alphabet)} of the alphabet; make the alphabet of all strings to "
            "train on"
        )
    return [torch.tensor([numbers[symbol] for symbol in string], dtype=torch.int64) for string in strings]


def frames_needed(target: Tensor) -> int:
    """Frames that a target (symbols,) takes at least: one a symbol, and a blank between equal neighbours."""
    return len(target) + int((target[1:] == target[:-1]).sum())


def ctc_loss(logits: Tensor, num_frames: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """CTC loss, -log p(target | frames), summed over clips: divide by the clips of the whole step.

    Graves et al. 2006, https://doi.org/10.1145/1143844.1143891.

    Args:
        logits: (batch, frames, symbols + 1), the blank first.
        num_frames: valid frames of each clip, (batch,), int64.
        targets: numbers of the symbols of each clip, (symbols,), int64; an empty one wants blanks alone.

    Returns:
        0-dim, float32.

    Raises:
        ValueError: a target holds the blank or no symbol of the head, numbers do not fit, or a clip has fewer frames
            than its target needs.
    """
    num_symbols = logits.shape[-1] - 1
    if logits.ndim != 3 or len(targets) != len(logits) or num_frames.shape != (len(logits),):
        raise ValueError(
            f"logits {tuple(logits.shape)}, num_frames {tuple(num_frames.shape)} and {len(targets)} targets do not "
            "fit; give (batch, frames, symbols + 1) with one length and one target for each clip"
        )
    for row, target in enumerate(targets):
        if ((target <= BLANK) | (target > num_symbols)).any():
            wrong = int(target[(target <= BLANK) | (target > num_symbols)][0])
            raise ValueError(
                f"target {row} holds {wrong}; symbols have numbers 1 to {num_symbols}, {BLANK} is the blank, which no "
                "target may hold"
            )
        needed = frames_needed(target)
        if needed > int(num_frames[row]):
            raise ValueError(
                f"clip {row} has {int(num_frames[row])} frames, and its {len(target)} symbols need {needed}; leave it "
                "out, or take shorter strings"
            )
    lengths = torch.tensor([len(target) for target in targets])
    scores = F.log_softmax(logits.float(), dim=-1).transpose(0, 1)
    joined = torch.cat(list(targets)).to(logits.device)
    return F.ctc_loss(scores, joined, num_frames.cpu(), lengths, blank=BLANK, reduction="sum")


def ctc_greedy(logits: Tensor, num_frames: Tensor, alphabet: Sequence[str]) -> list[list[str]]:
    """The likeliest symbol of each frame, repeats taken together and blanks dropped.

    Args:
        logits: (batch, frames, symbols + 1), the blank first.
        num_frames: valid frames of each clip, (batch,), int64.
        alphabet: symbols, the first with number 1.
    """
    strings = []
    for best, length in zip(logits.argmax(dim=-1), num_frames.tolist(), strict=True):
        runs = torch.unique_consecutive(best[:length]).tolist()
        strings.append([alphabet[number - 1] for number in runs if number != BLANK])
    return strings


def entity_symbols(slots: dict[str, str]) -> list[str]:
    """Slots as one string: `<name>` as a symbol, then the letters of its value, and so on."""
    return [symbol for name, value in slots.items() for symbol in (f"<{name}>", *value)]


def entities_of(symbols: Sequence[str]) -> dict[str, str]:
    """The slots in a string of `entity_symbols`; letters before the first name and slots without a value are dropped.

    A slot that comes twice has both values, with a comma between them.
    """
    slots: dict[str, str] = {}
    parts: list[tuple[str, list[str]]] = []
    for symbol in symbols:
        if len(symbol) > 1:
            parts.append((symbol[1:-1], []))
        elif parts:
            parts[-1][1].append(symbol)
    for name, letters in parts:
        value = "".join(letters).strip()
        if value:
            slots[name] = f"{slots[name]}, {value}" if name in slots else value
    return slots
