"""Search for the entries of joint codebooks whose sum is near a frame."""

import torch
import torch.nn.functional as F
from torch import Tensor

SEARCH_BYTES = 32 * 2**20  # of a chunk of frames in the search
MAX_KEPT = 128


def refine_codes(
    frames: Tensor, codes: Tensor, centers: Tensor, num_refine: int = 1, *, keep_current: bool = True
) -> Tensor:
    """Change codes, several at a time, so that their entries add up to nearly the frames.

    Each call scores every entry of every codebook with all else held, keeps the best few, and joins neighbouring
    codebooks two by two, of whose pairs it keeps the best few again, until one combination is left. Frames whose codes
    a call leaves alone are done. Memory is bounded, whatever the number of frames.

    Args:
        frames: (frames, dim).
        codes: to start from, (frames, num_codebooks), int64.
        centers: entries, (num_codebooks, codebook_size, dim).
        num_refine: calls.
        keep_current: let the codes as they are survive, so that no error rises. False is the published search.

    Returns:
        (frames, num_codebooks), int64; no gradients.
    """
    with torch.no_grad(), torch.autocast(frames.device.type, enabled=False):
        # the search is blind to a shift of a codebook; around 0, squares lose the fewest digits
        means = centers.float().mean(dim=1, keepdim=True)
        centers, offset = centers.float() - means, means.sum(dim=(0, 1))
        squares = centers.square().sum(dim=-1)
        size = chunk_frames(*centers.shape)
        refined = []
        for part, chosen in zip(frames.split(size), codes.split(size), strict=True):
            part, chosen = part.float() - offset, chosen.clone()
            moving = torch.arange(len(part), device=part.device)
            for _ in range(num_refine):
                before = chosen[moving]
                after = _refine(part[moving], before, centers, squares, keep_current)
                chosen[moving] = after
                moving = moving[(after != before).any(dim=-1)]
                if not len(moving):
                    break
            refined.append(chosen)
    return torch.cat(refined)


def _refine(frames: Tensor, codes: Tensor, centers: Tensor, squares: Tensor, keep_current: bool) -> Tensor:
    num_codebooks, codebook_size, _ = centers.shape
    books = torch.arange(num_codebooks, device=codes.device)
    current = centers[books, codes]
    error = current.sum(dim=1) - frames
    total = error.square().sum(dim=-1)[:, None, None]
    rest = error[:, None] - current
    products = torch.matmul(rest.transpose(0, 1), centers.transpose(1, 2)).transpose(0, 1)
    scores = rest.square().sum(dim=-1, keepdim=True) + squares + 2 * products  # (frames, choices, candidates)
    no_change = codes[..., None]
    deltas: Tensor | None = None  # of the candidates, (frames, choices, candidates, dim)
    chosen = no_change  # their codes, (frames, choices, candidates, codebooks of a choice)
    while True:
        num_choices, per_choice = scores.shape[1], num_codebooks // scores.shape[1]
        num_kept = 1 if num_choices == 1 else min(scores.shape[2], _num_kept(codebook_size, per_choice))
        if keep_current:
            scores = scores.scatter(-1, no_change, total.expand_as(no_change))
        ranked = scores if num_choices == 1 or not keep_current else scores.scatter(-1, no_change, -torch.inf)
        kept = ranked.topk(num_kept, dim=-1, largest=False).indices
        if deltas is None:
            first = second = kept
            chosen = kept[..., None]
        else:
            first, second = kept // deltas.shape[2], kept % deltas.shape[2]
            chosen = torch.cat([_pick(chosen[:, 0::2], first), _pick(chosen[:, 1::2], second)], dim=-1)
        if num_choices == 1:
            return chosen[:, 0, 0]
        if deltas is None:  # what is not kept is never made
            deltas = centers[books[:, None], kept].sub_(current[:, :, None])
        else:
            deltas = _sum_pairs(deltas, first, second)
        scores = scores.gather(-1, kept)
        even, odd = scores[:, 0::2, :, None], scores[:, 1::2, None, :]
        crossed = torch.matmul(deltas[:, 0::2], deltas[:, 1::2].transpose(-1, -2))
        scores = (even + odd - total[..., None] + 2 * crossed).flatten(-2)
        no_change = torch.zeros_like(scores[..., :1], dtype=torch.int64)  # with keep_current it ranks first


def _pick(values: Tensor, positions: Tensor) -> Tensor:
    """Values (frames, choices, candidates, width) of these candidates, (frames, choices, kept)."""
    return values.gather(2, positions[..., None].expand(-1, -1, -1, values.shape[-1]))


def _sum_pairs(deltas: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Deltas of neighbouring choices together, (frames, choices / 2, kept, dim), without a copy of either.

    Args:
        deltas: (frames, choices, candidates, dim).
        first: candidates of the even choices, (frames, choices / 2, kept).
        second: of the odd ones.
    """
    num_frames, num_choices, num_candidates, dim = deltas.shape
    starts = num_candidates * torch.arange(num_frames * num_choices, device=deltas.device)
    starts = starts.view(num_frames, num_choices, 1)
    pairs = torch.stack([starts[:, 0::2] + first, starts[:, 1::2] + second], dim=-1)
    return F.embedding_bag(pairs.view(-1, 2), deltas.view(-1, dim), mode="sum").view(*first.shape, dim)


def _num_kept(codebook_size: int, per_choice: int) -> int:
    """Candidates that survive, of a choice that holds so many codebooks; it doubles each time these grow fourfold."""
    smallest = 8 if codebook_size <= 16 else 16
    return min(smallest << ((per_choice.bit_length() - 1) // 2), MAX_KEPT)


def chunk_frames(num_codebooks: int, codebook_size: int, dim: int) -> int:
    """Frames that a search takes together."""
    kept = _num_kept(codebook_size, num_codebooks)
    floats = num_codebooks * (2 * min(kept, codebook_size) * dim + 3 * codebook_size + 3 * dim) + 6 * kept**2
    return max(1, SEARCH_BYTES // (4 * floats))
