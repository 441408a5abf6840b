"""Teachers as codes: a student predicts which entries of several codebooks make up the teacher's frame.

MVQ, Guo et al. 2022, https://arxiv.org/abs/2211.00508; codes are those of `speechkd.models.quantizer`. The head that
predicts them belongs to the training alone.

    predictor = CodebookPredictor(dim=512, num_codebooks=16)
    codes = align_codes(codes, hidden.shape[1], teacher_rate_hz=50, student_rate_hz=25)
    loss = codebook_loss(hidden, codes, predictor, mask)
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speechkd.losses.contract import IGNORE_INDEX, Number, Reduction, as_float, check_mask, reduce_rows

PredictorMode = Literal["independent", "joint"]
MAX_LENGTH_GAP = 5  # teacher frames by which rounding of lengths may move the end of a clip


class CodebookPredictor(nn.Module):
    """Logits of the codes of a frame.

    In mode "independent", which the authors advise, each codebook has a linear head. In mode "joint" a codebook is told
    the true codes of those before it.

    Args:
        dim: width of the student's states.
        num_codebooks: codes of a student frame, after `align_codes`.
        codebook_size: entries of a codebook.
        mode: see above.
        hidden_dim: width of what a joint predictor makes of state and codes.

    Raises:
        ValueError: a size is below 1, or the mode unknown, or a single codebook is to be joint.
    """

    def __init__(
        self,
        dim: int,
        num_codebooks: int,
        codebook_size: int = 256,
        *,
        mode: PredictorMode = "independent",
        hidden_dim: int = 512,
    ) -> None:
        super().__init__()
        if min(dim, num_codebooks, codebook_size, hidden_dim) < 1:
            raise ValueError(
                f"sizes must be 1 or more, got dim={dim}, num_codebooks={num_codebooks}, "
                f"codebook_size={codebook_size}, hidden_dim={hidden_dim}"
            )
        if mode not in ("independent", "joint"):
            raise ValueError(f"mode must be independent or joint, got {mode!r}")
        if mode == "joint" and num_codebooks == 1:
            raise ValueError("mode joint needs 2 codebooks or more, got num_codebooks=1; take mode independent")
        self.num_codebooks, self.codebook_size, self.mode = num_codebooks, codebook_size, mode
        self.weight = nn.Parameter(torch.randn(num_codebooks, codebook_size, dim) / math.sqrt(dim))
        self.bias = nn.Parameter(torch.zeros(num_codebooks, codebook_size))
        if mode == "joint":  # without gradients otherwise, which DDP takes for an error
            scale = 1 / math.sqrt(hidden_dim)
            self.linear1 = nn.Linear(dim, hidden_dim)
            self.embedding = nn.Parameter(torch.randn((num_codebooks - 1) * codebook_size, hidden_dim) * scale)
            self.joint_weight = nn.Parameter(torch.randn(num_codebooks, codebook_size, hidden_dim) * scale)

    def forward(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Logits, (frames, num_codebooks, codebook_size); in float32 also inside autocast.

        Args:
            hidden: states, (frames, dim).
            codes: of the same frames, (frames, num_codebooks), int64; only a joint predictor reads them.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.weight.dtype)
            logits = torch.einsum("fd,nkd->fnk", hidden, self.weight) + self.bias
            if self.mode == "joint":
                firsts = self.codebook_size * torch.arange(self.num_codebooks - 1, device=codes.device)
                before = F.embedding(codes[:, :-1].clamp(min=0) + firsts, self.embedding).cumsum(dim=1)
                before = before * (0.5 * math.sqrt(self.embedding.shape[1] / self.num_codebooks))
                told = self.linear1(hidden)[:, None] + F.pad(before, (0, 0, 1, 0))  # the first is told nothing
                logits = logits + torch.einsum("fnh,nkh->fnk", F.relu(told), self.joint_weight)
        return as_float(logits)


def codebook_loss(
    hidden: Tensor,
    codes: Tensor,
    predictor: CodebookPredictor,
    mask: Tensor | None = None,
    *,
    reduction: Reduction = "token_mean",
    num_items: Number = None,
) -> Tensor:
    """Cross entropy of the codes of a frame, summed over them and divided by their number.

    A frame is scored where the mask is True and a code is there; the mean is over scored frames. So the weight of the
    loss does not depend on the number of codebooks, and starts near ln 256 = 5.545. The published recipes sum over the
    codes: their weight of 0.1 with 16 codes is 1.6 here.

    Args:
        hidden: student states, (batch, frames, dim).
        codes: of the teacher, (batch, frames, num_codebooks), int64, -100 where there is none; see `align_codes`.
        predictor: of these codes, trained along and then dropped.
        mask: True on real frames, (batch, frames), bool; None scores all.
        reduction, num_items: see `reduce_rows`; its tokens are frames.

    Raises:
        ValueError: codes do not fit the states or the predictor, or a joint predictor gets a frame with some codes.
    """
    scored = _scored_frames(hidden, codes, predictor, mask)
    codes = codes.to(hidden.device)[scored]
    logits = predictor(hidden[scored], codes)
    losses = F.cross_entropy(logits.transpose(1, 2), codes, ignore_index=IGNORE_INDEX, reduction="none")
    return reduce_rows(losses.sum(dim=-1) / predictor.num_codebooks, scored, reduction, num_items)


def _scored_frames(hidden: Tensor, codes: Tensor, predictor: CodebookPredictor, mask: Tensor | None) -> Tensor:
    mask = check_mask(mask, hidden)
    expected = (*mask.shape, predictor.num_codebooks)
    if codes.shape != expected:
        raise ValueError(
            f"codes are {tuple(codes.shape)}, the states {tuple(hidden.shape)} and the predictor of "
            f"{predictor.num_codebooks} codebooks need {expected}; bring them to the student's frames with align_codes"
        )
    if codes.dtype != torch.int64:
        raise ValueError(f"codes must be int64, got {codes.dtype}, which cannot hold -100; pass codes.long()")
    is_code = codes.to(hidden.device) != IGNORE_INDEX
    wrong = is_code & ((codes < 0) | (codes >= predictor.codebook_size)).to(hidden.device)
    if wrong.any():
        raise ValueError(
            f"code {codes.to(hidden.device)[wrong][0].item()} is not in a codebook of {predictor.codebook_size} "
            f"entries; frames without codes have {IGNORE_INDEX}, and packed codes are unpacked by the quantizer"
        )
    scored = mask & is_code.any(dim=-1)
    if predictor.mode == "joint" and (scored & ~is_code.all(dim=-1)).any():
        row, frame = (scored & ~is_code.all(dim=-1)).nonzero()[0].tolist()
        raise ValueError(
            f"frame {frame} of clip {row} has codes for a part of its {predictor.num_codebooks} codebooks, and a joint "
            "predictor needs all or none; take mode independent, or mask the last frame of each clip"
        )
    return scored


def align_codes(
    codes: Tensor,
    num_frames: int,
    *,
    teacher_rate_hz: float = 50.0,
    student_rate_hz: float = 50.0,
    delay_frames: int = 0,
) -> Tensor:
    """Codes at the frames of a student.

    Of a teacher r times as fast a student frame has the codes of r frames, the first ones first. Codes of a slower one
    are repeated for the student frames nearest to them. Where a clip ends some frames early it is padded with -100,
    what is beyond the student's end is dropped.

    Args:
        codes: (batch, teacher frames, num_codebooks), of any integer type; -100 on padding.
        num_frames: of the student.
        teacher_rate_hz: of the codes.
        student_rate_hz: of the student's states.
        delay_frames: student frames by which a streaming student may be late: its frame t + delay is to predict the
            codes of frame t, and those of the last frames are dropped.

    Returns:
        (batch, num_frames, r * num_codebooks), int64.

    Raises:
        ValueError: the teacher's rate is above the student's and no multiple, lengths do not fit the rates, or the
            delay is negative.
    """
    if codes.ndim != 3 or codes.is_floating_point():
        raise ValueError(
            f"codes are {tuple(codes.shape)} {codes.dtype}; give integers (batch, teacher frames, num_codebooks)"
        )
    if min(teacher_rate_hz, student_rate_hz) <= 0 or delay_frames < 0:
        raise ValueError(
            f"rates must be positive and delay_frames 0 or more, got teacher_rate_hz={teacher_rate_hz}, "
            f"student_rate_hz={student_rate_hz}, delay_frames={delay_frames}"
        )
    ratio = teacher_rate_hz / student_rate_hz
    per_frame = round(ratio) if ratio >= 1 else 1
    if ratio > 1 and abs(ratio - per_frame) > 1e-3 * ratio:
        raise ValueError(
            f"teacher_rate_hz={teacher_rate_hz:g} is {ratio:.2f} times student_rate_hz={student_rate_hz:g}, which is "
            "no whole number; take a student whose frames last a multiple of the teacher's"
        )
    wanted = per_frame * num_frames if ratio >= 1 else math.ceil(ratio * num_frames)
    # a student frame may be more or less at the end, whatever its length
    allowed = max(MAX_LENGTH_GAP, 2 * per_frame)
    if abs(codes.shape[1] - wanted) > allowed:
        raise ValueError(
            f"{codes.shape[1]} frames of codes at teacher_rate_hz={teacher_rate_hz:g} are not those of {num_frames} "
            f"student frames at student_rate_hz={student_rate_hz:g}, which last {wanted}; give the true rates, and "
            "codes of the same clips"
        )
    codes = F.pad(codes.long(), (0, 0, 0, max(0, wanted - codes.shape[1])), value=IGNORE_INDEX)
    if ratio >= 1:
        codes = codes[:, :wanted].unflatten(1, (num_frames, per_frame)).flatten(2)
    else:
        middles = (torch.arange(num_frames, device=codes.device) + 0.5) * ratio
        codes = codes[:, middles.long()]
    kept = max(0, num_frames - delay_frames)
    return F.pad(codes[:, :kept], (0, 0, num_frames - kept, 0), value=IGNORE_INDEX)
