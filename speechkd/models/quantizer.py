"""Frames of a teacher as a few bytes each: one entry from each of several codebooks, whose sum is near the frame.

MVQ, Guo et al. 2022, https://arxiv.org/abs/2211.00508. Codebooks are trained jointly and have no order, so that finding
the best entries is a search. `quantizer_fit.fit` trains a quantizer; the names of its weights are those of the public
package, whose files load here.
"""

import hashlib
import json
import math
import pickle
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from speechkd.files import atomic_write, write_json
from speechkd.models.quantizer_search import chunk_frames, refine_codes

NUM_REFINE = 5  # calls of the search after which hardly a code changes
SCALE_SPEED = 10.0  # a scale s stands for exp(10 s), which multiplies its learning rate
MAX_CODEBOOKS = 256
ID_LENGTH = 8
FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
WEIGHT_NAMES = ("to_logits.weight", "to_logits.bias", "centers", "logits_scale", "centers_scale")


class QuantizerError(ValueError):
    """A quantizer cannot be made, loaded or used as asked; the message says why."""


class Quantizer(nn.Module):
    """A frame is the sum of one entry of each codebook.

    Args:
        dim: width of a frame.
        num_codebooks: codes of a frame, a power of two.
        codebook_size: entries of a codebook, a power of two up to 256.

    Raises:
        QuantizerError: an argument is out of its range.
    """

    id_buf: Tensor

    def __init__(self, dim: int, num_codebooks: int, codebook_size: int = 256) -> None:
        super().__init__()
        check_sizes(dim, num_codebooks, codebook_size)
        self.dim, self.num_codebooks, self.codebook_size = dim, num_codebooks, codebook_size
        self.to_logits = nn.Linear(dim, num_codebooks * codebook_size)
        bound = 1 / math.sqrt(dim)
        nn.init.uniform_(self.to_logits.weight, -bound, bound)
        nn.init.uniform_(self.to_logits.bias, -bound, bound)
        weight = self.to_logits.weight.detach()
        self.centers = nn.Parameter(weight.view(num_codebooks, codebook_size, dim).clone())
        self.logits_scale = nn.Parameter(torch.zeros(()))
        self.centers_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("id_buf", torch.zeros(ID_LENGTH, dtype=torch.uint8))
        self.source: dict[str, Any] | None = None  # whose frames it was fitted on
        self.refresh_id()

    @property
    def id(self) -> str:
        """Eight characters by which codes are matched to the quantizer that made them."""
        return bytes(self.id_buf.tolist()).decode("ascii")

    @torch.no_grad()
    def refresh_id(self) -> None:
        """Name the weights as they are now: equal weights get equal names. `quantizer_fit.fit` does so at its end."""
        digest = hashlib.sha256()
        for parameter in self.parameters():
            digest.update(parameter.detach().cpu().contiguous().numpy().data)
        self.id_buf.copy_(torch.tensor(list(digest.hexdigest()[:ID_LENGTH].encode()), dtype=torch.uint8))

    @property
    def bytes_per_frame(self) -> int:
        """Of what `encode` returns."""
        return self.num_codebooks // codes_per_byte(self.num_codebooks, self.codebook_size)

    @property
    def storage_ratio(self) -> float:
        """Bytes of a frame in float32 over those of its codes."""
        return 4 * self.dim / self.bytes_per_frame

    def logits(self, frames: Tensor) -> Tensor:
        """What the search starts from, (..., num_codebooks, codebook_size), float32; takes part in training.

        Args:
            frames: (..., dim).
        """
        with torch.autocast(frames.device.type, enabled=False):
            scaled = frames.float() * torch.exp(SCALE_SPEED * self.logits_scale)
            logits = F.linear(scaled, self.to_logits.weight, self.to_logits.bias)
        return logits.unflatten(-1, (self.num_codebooks, self.codebook_size))

    def effective_centers(self) -> Tensor:
        """Entries as they are summed, (num_codebooks, codebook_size, dim)."""
        return self.centers * torch.exp(SCALE_SPEED * self.centers_scale)

    @torch.no_grad()
    def data_mean(self) -> Tensor:
        """Mean of the frames, (dim,), were all entries used equally."""
        return self.effective_centers().mean(dim=1).sum(dim=0)

    @torch.no_grad()
    def search(
        self, frames: Tensor, num_refine: int = NUM_REFINE, *, keep_current: bool = True, check: bool = True
    ) -> Tensor:
        """Codes whose entries add up to nearly each frame.

        Args:
            frames: (..., dim), finite.
            num_refine: calls of the search; 0 takes the likeliest code of each codebook.
            keep_current: see `refine_codes`.
            check: look for frames that are not finite, which waits for a GPU.

        Returns:
            (..., num_codebooks), int64.

        Raises:
            QuantizerError: frames have another width, or one is not finite.
        """
        if check:
            self.check_frames(frames)
        flat = frames.reshape(-1, self.dim).float()
        size = chunk_frames(self.num_codebooks, self.codebook_size, self.dim)
        codes = torch.cat([self.logits(part).argmax(dim=-1) for part in flat.split(size)])
        codes = refine_codes(flat, codes, self.effective_centers(), num_refine, keep_current=keep_current)
        return codes.view(*frames.shape[:-1], self.num_codebooks)

    def encode(self, frames: Tensor, num_refine: int = NUM_REFINE, *, keep_current: bool = True) -> Tensor:
        """Codes of frames, packed to bytes; arguments and errors are those of `search`.

        Returns:
            (..., bytes_per_frame), uint8.
        """
        return pack_codes(self.search(frames, num_refine, keep_current=keep_current), self.codebook_size)

    def decode(self, codes: Tensor) -> Tensor:
        """Frames of codes; gradients reach the entries.

        Args:
            codes: (..., bytes_per_frame) of `encode` or (..., num_codebooks) of `search`, of any integer type.

        Returns:
            (..., dim), float32.

        Raises:
            QuantizerError: the codes have another width, or one is no entry.
        """
        codes = self.unpack(codes)
        rows = codes + self.codebook_size * torch.arange(self.num_codebooks, device=codes.device)
        entries = self.effective_centers().flatten(0, 1)
        summed = F.embedding_bag(rows.reshape(-1, self.num_codebooks), entries, mode="sum")
        return summed.view(*codes.shape[:-1], self.dim)

    def unpack(self, codes: Tensor) -> Tensor:
        """Codes as `search` gives them, (..., num_codebooks), int64, of bytes or of codes; see `decode`."""
        if codes.is_floating_point() or codes.shape[-1:] not in ((self.num_codebooks,), (self.bytes_per_frame,)):
            raise QuantizerError(
                f"codes are {tuple(codes.shape)} {codes.dtype}, but quantizer {self.id} has {self.num_codebooks} codes "
                f"in {self.bytes_per_frame} bytes a frame; give integers (..., {self.bytes_per_frame}), and the "
                "quantizer that made them"
            )
        if codes.shape[-1] != self.num_codebooks:
            return unpack_codes(codes, self.num_codebooks, self.codebook_size)
        codes = codes.long()
        if codes.numel() and not 0 <= codes.min() <= codes.max() < self.codebook_size:
            wrong = codes.max() if codes.max() >= self.codebook_size else codes.min()
            raise QuantizerError(
                f"code {int(wrong)} is no entry of the {self.codebook_size} of quantizer {self.id}; give the quantizer "
                "that made the codes, and leave padded frames out"
            )
        return codes

    def relative_error(self, frames: Tensor, decoded: Tensor) -> Tensor:
        """Squared error of decoded frames over that of `data_mean`; 0-dim, float32. 1 is no better than the mean."""
        frames = frames.float()
        return (decoded - frames).square().sum() / ((frames - self.data_mean()).square().sum() + 1e-20)

    def check_frames(self, frames: Tensor) -> None:
        """Refuse frames that cannot be quantized.

        Raises:
            QuantizerError: they have another width, or one is not finite.
        """
        if frames.shape[-1:] != (self.dim,):
            raise QuantizerError(
                f"frames are {tuple(frames.shape)}, but quantizer {self.id} takes (..., {self.dim}); give the states "
                "of the teacher and layer that it was fitted on"
            )
        check_finite(frames)

    def check_id(self, made_by: str, what: str = "the codes") -> None:
        """Refuse codes of another quantizer.

        Args:
            made_by: id of the quantizer that made them.
            what: they are, for the message.

        Raises:
            QuantizerError: names both ids.
        """
        if made_by != self.id:
            raise QuantizerError(
                f"{what} were made by quantizer {made_by}, but this is quantizer {self.id}; load quantizer {made_by}, "
                "or label again with this one"
            )


def codes_per_byte(num_codebooks: int, codebook_size: int) -> int:
    """Neighbouring codes that share a byte: 2 of 16 entries, 4 of 4, 8 of 2; as many as there are."""
    return min(num_codebooks, 8 // (codebook_size - 1).bit_length())


def pack_codes(codes: Tensor, codebook_size: int) -> Tensor:
    """Codes as bytes: of those that share one, the first counts ones, the next `codebook_size`, and so on.

    Args:
        codes: (..., num_codebooks), int64.
        codebook_size: entries of a codebook.

    Returns:
        (..., bytes), uint8.
    """
    per_byte = codes_per_byte(codes.shape[-1], codebook_size)
    weights = codebook_size ** torch.arange(per_byte, device=codes.device)
    return (codes.unflatten(-1, (-1, per_byte)) * weights).sum(dim=-1).to(torch.uint8)


def unpack_codes(packed: Tensor, num_codebooks: int, codebook_size: int) -> Tensor:
    """Codes of `pack_codes`, (..., num_codebooks), int64.

    Raises:
        QuantizerError: a byte is beyond all codes.
    """
    per_byte = codes_per_byte(num_codebooks, codebook_size)
    packed = packed.long()
    if packed.numel() and not 0 <= packed.min() <= packed.max() < codebook_size**per_byte:
        raise QuantizerError(
            f"bytes of codes go up to {int(packed.max())}, but {per_byte} codes of {codebook_size} entries end at "
            f"{codebook_size**per_byte - 1}; give the quantizer that made them"
        )
    weights = codebook_size ** torch.arange(per_byte, device=packed.device)
    return (packed[..., None] // weights % codebook_size).flatten(-2)


def save_quantizer(quantizer: Quantizer, folder: str | Path) -> None:
    """Write `model.safetensors` and `config.json`; the folder is created where it is missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in quantizer.state_dict().items()}
    with atomic_write(folder / WEIGHTS) as temporary:
        save_file(weights, temporary)
    config = {
        "format_version": FORMAT_VERSION,
        "id": quantizer.id,
        "dim": quantizer.dim,
        "num_codebooks": quantizer.num_codebooks,
        "codebook_size": quantizer.codebook_size,
        "source": quantizer.source,
    }
    write_json(folder / CONFIG, config)


def load_quantizer(path: str | Path) -> Quantizer:
    """A quantizer in eval mode, on the CPU.

    Args:
        path: folder of `save_quantizer`; or a file with the state dict of the public package, as PyTorch or
            safetensors wrote it, whose quantizer has no `source`.

    Raises:
        QuantizerError: nothing is there, or it is no quantizer, or not the one that config.json names.
    """
    path = Path(path)
    if path.is_file():
        try:
            weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            raise QuantizerError(f"quantizer {path} cannot be read: {error}; give the file of a state dict") from error
        return quantizer_from_state_dict(weights, str(path))
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise QuantizerError(
            f"quantizer folder {path} lacks {CONFIG} or {WEIGHTS}; fit one with `speechkd fit-quantizer`, or give the "
            "file of a state dict"
        )
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    if config.get("format_version") != FORMAT_VERSION:
        raise QuantizerError(
            f"quantizer {path} has format {config.get('format_version')}, this version reads {FORMAT_VERSION}; fit it "
            "again"
        )
    quantizer = quantizer_from_state_dict(load_file(path / WEIGHTS), str(path))
    quantizer.check_id(config["id"], f"{path / CONFIG} says that codes")
    quantizer.source = config["source"]
    return quantizer


def quantizer_from_state_dict(weights: Mapping[str, Tensor], name: str = "of a state dict") -> Quantizer:
    """A quantizer in eval mode with these weights.

    Args:
        weights: `to_logits.weight`, `to_logits.bias`, `centers`, `logits_scale`, `centers_scale` and `id_buf`.
        name: of their file, for messages.

    Raises:
        QuantizerError: a weight is missing, of another shape or not finite, or the id is not eight hex characters.
    """
    expected = (*WEIGHT_NAMES, "id_buf")
    missing = [key for key in expected if key not in weights] if isinstance(weights, Mapping) else list(expected)
    if missing:
        raise QuantizerError(f"quantizer {name} has no {', '.join(missing)}; give the state dict of a quantizer")
    centers = weights["centers"]
    if centers.ndim != 3:
        raise QuantizerError(
            f"quantizer {name} has centers {tuple(centers.shape)}, not (codebooks, entries, dim); give the state dict "
            "of a quantizer"
        )
    num_codebooks, codebook_size, dim = centers.shape
    with torch.random.fork_rng(devices=[]):  # whoever loads a quantizer keeps the random numbers
        quantizer = Quantizer(dim, num_codebooks, codebook_size)
    for key, ours in quantizer.state_dict().items():
        theirs = weights[key]
        if theirs.numel() != ours.numel() or (ours.ndim and theirs.shape != ours.shape):
            raise QuantizerError(
                f"quantizer {name}: {key} is {tuple(theirs.shape)}, but with centers {tuple(centers.shape)} it is "
                f"{tuple(ours.shape)}; give the state dict of one quantizer"
            )
        if not theirs.float().isfinite().all():
            raise QuantizerError(f"quantizer {name}: {key} holds NaN or infinity; fit it again")
        ours.copy_(theirs.view(ours.shape))
    if not set(quantizer.id_buf.tolist()) <= set(string.hexdigits.encode()):
        raise QuantizerError(
            f"quantizer {name}: id_buf is {quantizer.id_buf.tolist()}, not the codes of eight hex characters; give the "
            "state dict of a quantizer"
        )
    return quantizer.eval()


def check_sizes(dim: int, num_codebooks: int, codebook_size: int) -> None:
    """Refuse sizes that the search or a byte cannot hold.

    Raises:
        QuantizerError: one is out of its range.
    """
    if dim < 1:
        raise QuantizerError(f"dim must be 1 or more, got {dim}; give the width of the teacher's states")
    for name, value, smallest, largest in (
        ("num_codebooks", num_codebooks, 1, MAX_CODEBOOKS),
        ("codebook_size", codebook_size, 2, 256),
    ):
        allowed = [2**power for power in range(smallest.bit_length() - 1, largest.bit_length())]
        if value not in allowed:
            nearest = min((abs(size - value), size) for size in allowed)[1]
            raise QuantizerError(
                f"{name} must be a power of two from {smallest} to {largest}, got {value}; take {nearest}"
            )


def check_finite(frames: Tensor) -> None:
    """Refuse frames that are not numbers.

    Raises:
        QuantizerError: names the first.
    """
    bad = ~frames.reshape(-1, frames.shape[-1]).isfinite().all(dim=-1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise QuantizerError(
            f"{int(bad.sum())} of {len(bad)} frames hold NaN or infinity, the first is frame {first}; leave padding "
            "out, and look for NaN in the teacher's weights and its clips"
        )
