"""The heads of SUPERB on a frozen encoder: labels of a clip, strings of symbols by CTC, and speaker embeddings.

SUPERB, Yang et al. 2021, https://arxiv.org/abs/2105.01051, with the sizes of its toolkit s3prl. Every head begins with
a weighted sum of the encoder's layers and learns the weights together with the rest. All take

- states: of all layers, (batch, layers, frames, width), of any floating dtype; what stands on padding has no effect,
  but must be finite;
- mask: True on real frames, which come first, (batch, frames), bool;

and take the states to float32. They raise ValueError, with the values, on shapes and masks that do not fit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

TDNN_CONTEXTS = ((5, 1), (3, 2), (3, 3), (1, 1), (1, 1))  # frames that a layer sees, and the step between them
TDNN_LOST_FRAMES = sum((context - 1) * dilation for context, dilation in TDNN_CONTEXTS)  # 14


class LayerSum(nn.Module):
    """Softmax-weighted sum of the layers; at the start their mean.

    Args:
        num_layers: layers, the encoder's input among them: 13 for a Base model.

    Raises:
        ValueError: there is no layer.
    """

    def __init__(self, num_layers: int) -> None:
        if num_layers < 1:
            raise ValueError(f"a weighted sum needs one layer or more, got num_layers={num_layers}")
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_layers))

    @property
    def weights(self) -> Tensor:
        """Of the layers, (layers,), summing to 1."""
        return self.logits.softmax(dim=0)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """The sum, (batch, frames, width), float32, 0 on padding."""
        num_layers = len(self.logits)
        if states.ndim != 4 or states.shape[1] != num_layers or 0 in states.shape or not states.is_floating_point():
            raise ValueError(
                f"states are {tuple(states.shape)} of {states.dtype}; a head of {num_layers} layers needs (batch, "
                f"{num_layers}, frames, width), floating and none of them 0"
            )
        if mask.shape != (states.shape[0], states.shape[2]) or mask.dtype != torch.bool:
            raise ValueError(
                f"mask is {tuple(mask.shape)} of {mask.dtype}; states {tuple(states.shape)} need "
                f"{(states.shape[0], states.shape[2])} of torch.bool"
            )
        if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
            clip = int(torch.cat([~mask[:, :1], mask[:, 1:] & ~mask[:, :-1]], dim=1).any(dim=1).nonzero()[0])
            raise ValueError(
                f"clip {clip} of the batch has {int(mask[clip].sum())} real frames that do not stand at its beginning; "
                "put padding at the end, and leave out clips without a frame"
            )
        summed = torch.einsum("l,blfw->bfw", self.weights.float(), states.float())
        return summed.masked_fill(~mask[:, :, None], 0)


class UtteranceHead(nn.Module):
    """Labels of a clip: a linear map of each frame, the mean over frames, and a linear head for each label.

    For keywords, intents, speakers, emotions and slots. `understanding.understanding_loss` is its loss.

    Args:
        num_layers: as of `LayerSum`.
        width: of the states.
        num_classes: of each label; intents of Fluent Speech Commands are three.
        seed: of the first weights.
        hidden_size: of the first map.

    Raises:
        ValueError: there is no layer, no label or a label without classes.
    """

    def __init__(
        self, num_layers: int, width: int, num_classes: Sequence[int], *, seed: int, hidden_size: int = 256
    ) -> None:
        if not num_classes or min(num_classes) < 1:
            raise ValueError(f"a head needs one class or more for each label, got num_classes={list(num_classes)}")
        super().__init__()
        self.layers = LayerSum(num_layers)
        with _seeded(seed):
            self.projection = nn.Linear(width, hidden_size)
            self.heads = nn.ModuleList(nn.Linear(hidden_size, count) for count in num_classes)

    def embed(self, states: Tensor, mask: Tensor) -> Tensor:
        """What the labels are read from, (batch, hidden size), float32."""
        frames = self.projection(self.layers(states, mask))
        return _masked_mean(frames, mask)

    def forward(self, states: Tensor, mask: Tensor) -> list[Tensor]:
        """Logits of each label, (batch, classes), float32."""
        embeddings = self.embed(states, mask)
        return [head(embeddings) for head in self.heads]


class PhoneHead(nn.Module):
    """Phones by CTC: two linear maps, without anything between. `ctc_head.ctc_loss` is its loss.

    Args:
        num_layers: as of `LayerSum`.
        width: of the states.
        num_symbols: of the alphabet, without the blank.
        seed: of the first weights.
        hidden_size: between the maps.

    Raises:
        ValueError: there is no layer or no symbol.
    """

    def __init__(self, num_layers: int, width: int, num_symbols: int, *, seed: int, hidden_size: int = 256) -> None:
        _check_symbols(num_symbols)
        super().__init__()
        self.layers = LayerSum(num_layers)
        with _seeded(seed):
            self.projection = nn.Linear(width, hidden_size)
            self.head = nn.Linear(hidden_size, num_symbols + 1)

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (batch, frames, symbols + 1), float32, the blank first; real frames of each clip, (batch,), int64."""
        return self.head(self.projection(self.layers(states, mask))), mask.sum(dim=1)


class CharacterHead(nn.Module):
    """Characters, or characters and slot names, by CTC: a linear map, two bidirectional LSTM layers, a linear map.

    `ctc_head.ctc_loss` is its loss. SUPERB masks the features with SpecAugment in training, before this head.

    Args:
        num_layers: as of `LayerSum`.
        width: of the states.
        num_symbols: of the alphabet, without the blank.
        seed: of the first weights.
        hidden_size: of the first map and of each direction.
        dropout: after each LSTM layer.

    Raises:
        ValueError: there is no layer or no symbol.
    """

    def __init__(
        self,
        num_layers: int,
        width: int,
        num_symbols: int,
        *,
        seed: int,
        hidden_size: int = 1024,
        dropout: float = 0.2,
    ) -> None:
        _check_symbols(num_symbols)
        super().__init__()
        self.layers = LayerSum(num_layers)
        with _seeded(seed):
            self.projection = nn.Linear(width, hidden_size)
            self.lstm = nn.LSTM(
                hidden_size, hidden_size, num_layers=2, batch_first=True, dropout=dropout, bidirectional=True
            )
            self.head = nn.Linear(2 * hidden_size, num_symbols + 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As of `PhoneHead.forward`."""
        frames, lengths = self.projection(self.layers(states, mask)), mask.sum(dim=1)
        packed = pack_padded_sequence(frames, lengths.cpu(), batch_first=True, enforce_sorted=False)
        frames, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=mask.shape[1])
        return self.head(self.dropout(frames)), lengths


class SpeakerHead(nn.Module):
    """Speaker embeddings: a time-delay network, mean and deviation over frames, two linear maps, as of x-vectors.

    Snyder et al. 2018, https://doi.org/10.1109/ICASSP.2018.8461375. `am_softmax_loss` is its loss. The network loses
    14 frames; a clip of fewer than 15 is repeated up to 15. SUPERB leaves out clips below 2 s, so there that never
    happens.

    Args:
        num_layers: as of `LayerSum`.
        width: of the states.
        num_speakers: to learn from.
        seed: of the first weights.
        hidden_size: of all maps but the last of the network.
        pooled_size: of that one.

    Raises:
        ValueError: there is no layer, or fewer than two speakers.
    """

    def __init__(
        self,
        num_layers: int,
        width: int,
        num_speakers: int,
        *,
        seed: int,
        hidden_size: int = 512,
        pooled_size: int = 1500,
    ) -> None:
        if num_speakers < 2:
            raise ValueError(f"speakers are told apart by two or more to learn from, got num_speakers={num_speakers}")
        super().__init__()
        self.layers = LayerSum(num_layers)
        with _seeded(seed):
            self.projection = nn.Linear(width, hidden_size)
            sizes = [hidden_size] * (len(TDNN_CONTEXTS) - 1) + [pooled_size]
            self.network = nn.ModuleList(
                nn.Conv1d(hidden_size, size, context, dilation=dilation)
                for size, (context, dilation) in zip(sizes, TDNN_CONTEXTS, strict=True)
            )
            self.embedding = nn.Linear(2 * pooled_size, hidden_size)
            self.last = nn.Linear(hidden_size, hidden_size)
            self.speakers = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_speakers, hidden_size)))

    def embed(self, states: Tensor, mask: Tensor) -> Tensor:
        """What trials are scored on, by cosine: the first map after pooling, (batch, hidden size), float32."""
        frames, lengths = _repeated(self.projection(self.layers(states, mask)), mask.sum(dim=1), TDNN_LOST_FRAMES + 1)
        frames = frames.transpose(1, 2)
        for layer in self.network:
            frames = F.relu(layer(frames))
        frames = frames.transpose(1, 2)
        # output t sees the inputs t to t + 14, so the first outputs see real frames alone
        valid = torch.arange(frames.shape[1], device=mask.device) < (lengths - TDNN_LOST_FRAMES)[:, None]
        mean = _masked_mean(frames, valid)
        variance = _masked_mean((frames - mean[:, None]).square(), valid)
        # the gradient of a root is infinite at 0, where clips of one output are
        pooled = torch.cat([mean, variance.clamp_min(1e-10).sqrt()], dim=-1)
        return F.relu(self.embedding(pooled))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Cosine with each speaker's vector, (batch, speakers), float32."""
        vectors = F.relu(self.last(self.embed(states, mask)))
        return F.linear(F.normalize(vectors, dim=-1), F.normalize(self.speakers, dim=-1))


def am_softmax_loss(cosines: Tensor, targets: Tensor, *, scale: float = 30.0, margin: float = 0.4) -> Tensor:
    """Cross entropy of scaled cosines, that of the right speaker less a margin; summed over clips.

    Additive margin softmax, Wang et al. 2018, https://arxiv.org/abs/1801.05599. Divide by the clips of the whole step.

    Args:
        cosines: of each clip with each speaker, (batch, speakers).
        targets: numbers of the right speakers, (batch,), int64.
        scale: of the cosines.
        margin: by which the right speaker has to win.

    Returns:
        0-dim, float32.

    Raises:
        ValueError: shapes or dtype do not fit, or a target is no speaker.
    """
    if cosines.ndim != 2 or targets.shape != (len(cosines),) or targets.dtype != torch.int64:
        raise ValueError(
            f"cosines {tuple(cosines.shape)} and targets {tuple(targets.shape)} of {targets.dtype} do not fit; give "
            "(batch, speakers) and (batch,) of torch.int64"
        )
    wrong = ((targets < 0) | (targets >= cosines.shape[1])).nonzero()
    if len(wrong):
        clip = int(wrong[0])
        raise ValueError(
            f"clip {clip} has speaker {int(targets[clip])}, and the head knows 0 to {cosines.shape[1] - 1}; train on "
            "the speakers that the head was made for"
        )
    right = F.one_hot(targets, cosines.shape[1])
    return F.cross_entropy(scale * (cosines.float() - margin * right), targets, reduction="sum")


def _masked_mean(frames: Tensor, mask: Tensor) -> Tensor:
    """Mean over real frames, (batch, dim)."""
    weight = mask[:, :, None].to(frames.dtype)
    return (frames * weight).sum(dim=1) / weight.sum(dim=1)


def _repeated(frames: Tensor, lengths: Tensor, shortest: int) -> tuple[Tensor, Tensor]:
    """Frames (batch, frames, dim) and lengths (batch,), shorter clips said again and again up to `shortest` frames."""
    position = torch.arange(max(frames.shape[1], shortest), device=frames.device).expand(len(frames), -1)
    source = torch.where(lengths[:, None] < shortest, position % lengths[:, None], position)
    return frames.gather(1, source[:, :, None].expand(-1, -1, frames.shape[2])), lengths.clamp_min(shortest)


def _check_symbols(num_symbols: int) -> None:
    if num_symbols < 1:
        raise ValueError(f"a CTC head needs one symbol or more, got num_symbols={num_symbols}; look at the texts")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """First weights by a seed of their own, without a trace in the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
