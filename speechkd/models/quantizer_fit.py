"""Training of a `Quantizer`: residual k-means, small codebooks first, then each two of them as one.

The two phases, their objective and schedule are those of the public package. What is added: training starts from
k-means instead of random numbers, without which codebooks stall on clustered frames, and frames are centred and scaled
by one number beforehand, so that the learning rates suit any teacher.
"""

import logging
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from speechkd.models.quantizer import NUM_REFINE, SCALE_SPEED, Quantizer, QuantizerError, check_finite, check_sizes

logger = logging.getLogger(__name__)

SMALL, LARGE = 16, 256  # entries of a codebook in the two phases
LEARNING_RATES = (0.005, 0.0025)
ENTROPY_WEIGHT = 0.01
HELD_OUT_SHARE, MAX_HELD_OUT = 0.05, 10_000
KMEANS_ITERATIONS = 15
KMEANS_FRAMES_PER_ENTRY = 128
STALLED_LOSS = 0.25
START_LOGITS_SCALE = 4.0
NUM_COMPARED = 4096
LOG_STEPS = 500


@dataclass(kw_only=True)
class FitConfig:
    """How a quantizer is trained.

    Args:
        bytes_per_frame: codebooks of 256 entries, a power of two.
        phase1_steps: steps with twice as many codebooks of 16 entries; 20,000 are suggested for 512 dims and more.
        phase2_steps: steps with those of 256.
        batch_size: frames of a step.
        start: "kmeans", or "random" as in the public package.
        keep_current: see `refine_codes`; False is the public package's search.
        seed: of all draws.
    """

    bytes_per_frame: int = 8
    phase1_steps: int = 10_000
    phase2_steps: int = 10_000
    batch_size: int = 512
    start: Literal["kmeans", "random"] = "kmeans"
    keep_current: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.bytes_per_frame < 1 or self.bytes_per_frame & (self.bytes_per_frame - 1):
            raise ValueError(f"bytes_per_frame must be a power of two, got {self.bytes_per_frame}; take 8 or 16")
        if min(self.phase1_steps, self.phase2_steps) < 0 or self.batch_size < 1:
            raise ValueError(
                f"steps must be 0 or more and batch_size 1 or more, got phase1_steps={self.phase1_steps}, "
                f"phase2_steps={self.phase2_steps}, batch_size={self.batch_size}"
            )


@dataclass(frozen=True)
class FitReport:
    """What a fitted quantizer does on frames that it was not trained on.

    Args:
        relative_errors: squared error over that of the mean, after 0 to 5 calls of the search.
        index_entropy_losses: of each codebook, see `index_entropy_losses`.
        num_train_frames: frames that it was trained on.
        num_held_out_frames: frames that it was measured on.
    """

    relative_errors: list[float]
    index_entropy_losses: list[float]
    num_train_frames: int
    num_held_out_frames: int


def fit(frames: Tensor, config: FitConfig | None = None) -> tuple[Quantizer, FitReport]:
    """Train a quantizer, on the device of the frames.

    Args:
        frames: of many utterances, (frames, dim), of any floating type, in which they stay; 5 % of them, 10,000 at
            most, are held out.
        config: by default 8 bytes a frame and the published schedule.

    Returns:
        The quantizer, in eval mode, and its report. Codebooks that hardly use their entries are named in a warning.

    Raises:
        QuantizerError: there are fewer frames than entries, or one is not finite.
    """
    config = config or FitConfig()
    if frames.ndim != 2:
        raise QuantizerError(f"frames are {tuple(frames.shape)}; give those of all utterances in one, (frames, dim)")
    check_sizes(frames.shape[1], config.bytes_per_frame, LARGE)
    num_held_out = min(int(HELD_OUT_SHARE * len(frames)), MAX_HELD_OUT)
    if len(frames) - num_held_out < LARGE:
        raise QuantizerError(
            f"{len(frames)} frames, of which {num_held_out} are held out, are fewer than the {LARGE} entries of a "
            "codebook; give frames of more utterances, a hundred times as many are good"
        )
    check_finite(frames)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(frames), generator=generator)
    pool = _Pool(frames, order[num_held_out:], *_mean_and_scale(frames))
    with torch.random.fork_rng(devices=[]), torch.autocast(frames.device.type, enabled=False):
        torch.default_generator.manual_seed(config.seed)
        quantizer = unscaled(_train(pool, config, generator), pool.mean, pool.scale).eval()
        held_out = frames[order[: num_held_out or MAX_HELD_OUT].to(frames.device)]
        return quantizer, measure(quantizer, held_out.float(), len(pool.rows))


@dataclass(frozen=True)
class _Pool:
    """Frames to train on, which are centred and scaled as they are taken."""

    frames: Tensor
    rows: Tensor
    mean: Tensor
    scale: Tensor

    def take(self, rows: Tensor) -> Tensor:
        return (self.frames[rows.to(self.frames.device)].float() - self.mean) / self.scale


def _mean_and_scale(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the frames, (dim,), and the deviation of a value from it, 0-dim; float32."""
    total = torch.zeros(frames.shape[1], dtype=torch.float64, device=frames.device)
    squares = torch.zeros((), dtype=torch.float64, device=frames.device)
    for part in frames.split(65_536):
        total += part.sum(dim=0, dtype=torch.float64)
        squares += part.float().square().sum(dtype=torch.float64)
    mean = total / len(frames)
    variance = squares / frames.numel() - mean.square().mean()
    return mean.float(), variance.clamp(min=1e-20).sqrt().float()


def _train(pool: _Pool, config: FitConfig, generator: torch.Generator) -> Quantizer:
    dim, device = pool.frames.shape[1], pool.frames.device
    sample = pool.take(pool.rows[: KMEANS_FRAMES_PER_ENTRY * LARGE]) if config.start == "kmeans" else None
    quantizer = Quantizer(dim, 2 * config.bytes_per_frame, SMALL).to(device)
    if sample is not None:
        start_at(quantizer, residual_kmeans(sample, 2 * config.bytes_per_frame, SMALL, generator), sample)
    # one step more than its number, as published
    _run_phase(quantizer, pool, 1, config.phase1_steps + 1, config, generator)
    quantizer = merge_codebooks(quantizer)
    if sample is not None:
        large = Quantizer(dim, config.bytes_per_frame, LARGE).to(device)
        start_at(large, residual_kmeans(sample, config.bytes_per_frame, LARGE, generator), sample)
        unseen = pool.take(pool.rows[-NUM_COMPARED:])
        errors = [_relative_error(candidate, unseen) for candidate in (quantizer, large)]
        logger.info("relative error of joined codebooks %.4f, of k-means %.4f; the better one is trained on", *errors)
        quantizer = large if errors[1] < errors[0] else quantizer
    _run_phase(quantizer, pool, 2, config.phase2_steps, config, generator)
    return quantizer


def _run_phase(
    quantizer: Quantizer, pool: _Pool, phase: int, num_steps: int, config: FitConfig, generator: torch.Generator
) -> None:
    base = LEARNING_RATES[phase - 1]
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=base, betas=(0.9, 0.98), eps=1e-9, weight_decay=1e-6)
    rows = pool.rows[:0]
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, config.phase1_steps if phase == 1 else num_steps, base)
        if len(rows) < min(config.batch_size, len(pool.rows)):  # the next pass over all frames
            rows = pool.rows[torch.randperm(len(pool.rows), generator=generator)]
        batch, rows = pool.take(rows[: config.batch_size]), rows[config.batch_size :]
        num_refine = 1 + int(torch.randint(2, (), generator=generator))
        codes = quantizer.search(batch, num_refine, keep_current=config.keep_current, check=False)
        terms = training_terms(quantizer, batch, codes)
        optimizer.zero_grad()
        (terms["reconstruction"] + terms["log_prob"] + ENTROPY_WEIGHT * terms["entropy"]).backward()
        optimizer.step()
        if step % LOG_STEPS == 0:
            values = ", ".join(f"{name} {value.item():.4f}" for name, value in terms.items())
            logger.info("phase %d, step %d of %d: %s", phase, step, num_steps, values)


def training_terms(quantizer: Quantizer, frames: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """Terms of the objective, each 0-dim, float32.

    `reconstruction` trains the entries: `Quantizer.relative_error`. The others train what the search starts from:
    `log_prob` is minus the mean log-probability of the codes that the search found, `entropy` how far the mean
    distribution over a codebook is from the even one, 0 to 1.

    Args:
        quantizer: in training.
        frames: (frames, dim).
        codes: of the frames, by `Quantizer.search`.
    """
    log_probs = quantizer.logits(frames).log_softmax(dim=-1)
    mean = log_probs.exp().mean(dim=0)
    entropies = -(mean * (mean + 1e-20).log()).sum(dim=-1)
    return {
        "reconstruction": quantizer.relative_error(frames, quantizer.decode(codes)),
        "log_prob": -log_probs.gather(-1, codes[..., None]).mean(),
        "entropy": 1 - entropies.mean() / math.log(quantizer.codebook_size),
    }


def index_entropy_losses(codes: Tensor, codebook_size: int) -> Tensor:
    """How far each codebook is from using its entries evenly: 0 is evenly, 1 is always the same entry.

    Above 0.05 or so on some thousands of frames a codebook carries less than it could.

    Args:
        codes: (frames, num_codebooks), int64.
        codebook_size: entries of a codebook.

    Returns:
        (num_codebooks,), float32.
    """
    counts = F.one_hot(codes.T, codebook_size).sum(dim=1)
    shares = counts / counts.sum(dim=-1, keepdim=True)
    return 1 + torch.special.xlogy(shares, shares).sum(dim=-1) / math.log(codebook_size)


def learning_rate(step: int, num_steps: int, base: float) -> float:
    """Of one step of a phase: half of it after each quarter."""
    return base * 0.5 ** (4 * step // num_steps if num_steps else 0)


@torch.no_grad()
def merge_codebooks(quantizer: Quantizer) -> Quantizer:
    """Each two codebooks as one with an entry for every pair of theirs; what it decodes and its argmax stay the same.

    Codes k1 and k2 become `codebook_size * k1 + k2`.

    Raises:
        QuantizerError: there is a single codebook, or pairs are too many for a byte.
    """
    num_codebooks, size = quantizer.num_codebooks // 2, quantizer.codebook_size**2
    check_sizes(quantizer.dim, num_codebooks, size)
    merged = Quantizer(quantizer.dim, num_codebooks, size).to(quantizer.centers.device)

    def pairs(values: Tensor) -> Tensor:  # (2 * codebooks, entries, ...) to (codebooks, entries ** 2, ...)
        first, second = values[0::2, :, None], values[1::2, None, :]
        return (first + second).flatten(1, 2)

    by_book = (quantizer.num_codebooks, quantizer.codebook_size)
    merged.to_logits.weight.copy_(pairs(quantizer.to_logits.weight.unflatten(0, by_book)).flatten(0, 1))
    merged.to_logits.bias.copy_(pairs(quantizer.to_logits.bias.unflatten(0, by_book)).flatten())
    merged.centers.copy_(pairs(quantizer.centers))
    merged.logits_scale.copy_(quantizer.logits_scale)
    merged.centers_scale.copy_(quantizer.centers_scale)
    merged.refresh_id()
    return merged


@torch.no_grad()
def unscaled(quantizer: Quantizer, mean: Tensor, scale: Tensor) -> Quantizer:
    """The quantizer that does to frames what this one does to (frames - mean) / scale."""
    plain = Quantizer(quantizer.dim, quantizer.num_codebooks, quantizer.codebook_size).to(mean.device)
    weight = quantizer.to_logits.weight * torch.exp(SCALE_SPEED * quantizer.logits_scale) / scale
    plain.to_logits.weight.copy_(weight)
    plain.to_logits.bias.copy_(quantizer.to_logits.bias - weight @ mean)
    plain.centers.copy_(quantizer.effective_centers() * scale + mean / quantizer.num_codebooks)
    plain.refresh_id()
    return plain


@torch.no_grad()
def start_at(quantizer: Quantizer, centers: Tensor, frames: Tensor) -> None:
    """Set the entries, and logits by which each codebook prefers the one nearest to what the others leave of a frame.

    Args:
        quantizer: before its training.
        centers: (num_codebooks, codebook_size, dim).
        frames: that are to be quantized, (frames, dim).
    """
    means = centers.mean(dim=1)
    others = means.sum(dim=0) - means
    bias = -(centers * others[:, None]).sum(dim=-1) - centers.square().sum(dim=-1) / 2
    logits = frames[:4096] @ centers.flatten(0, 1).T + bias.flatten()
    spread = logits.unflatten(-1, bias.shape).std(dim=-1).mean().clamp(min=1e-20)
    quantizer.centers.copy_(centers)
    quantizer.to_logits.weight.copy_(START_LOGITS_SCALE / spread * centers.flatten(0, 1))
    quantizer.to_logits.bias.copy_(START_LOGITS_SCALE / spread * bias.flatten())


def residual_kmeans(frames: Tensor, num_codebooks: int, codebook_size: int, generator: torch.Generator) -> Tensor:
    """K-means of the frames, then of what it leaves of them, and so on.

    Args:
        frames: (frames, dim), float32.
        num_codebooks: stages.
        codebook_size: means of a stage.
        generator: of random numbers, on the CPU.

    Returns:
        (num_codebooks, codebook_size, dim).
    """
    rest = frames[: KMEANS_FRAMES_PER_ENTRY * codebook_size]
    stages = []
    for _ in range(num_codebooks):
        centers = kmeans(rest, codebook_size, generator)
        rest = rest - centers[_nearest(rest, centers)]
        stages.append(centers)
    return torch.stack(stages)


def kmeans(frames: Tensor, num_means: int, generator: torch.Generator) -> Tensor:
    """Means of clusters, (num_means, dim), by Lloyd's algorithm from k-means++ seeds."""
    centers = _spread_seeds(frames, num_means, generator)
    for _ in range(KMEANS_ITERATIONS):
        nearest = _nearest(frames, centers)
        counts = torch.bincount(nearest, minlength=num_means)[:, None]
        sums = torch.zeros_like(centers).index_add_(0, nearest, frames)
        centers = torch.where(counts > 0, sums / counts.clamp(min=1), centers)
    return centers


def _spread_seeds(frames: Tensor, num_means: int, generator: torch.Generator) -> Tensor:
    """Frames drawn one after another, likelier the farther they are from those before."""
    seeds = [frames[int(torch.randint(len(frames), (), generator=generator))]]
    distances = torch.full((len(frames),), torch.inf, device=frames.device)
    for _ in range(num_means - 1):
        distances = torch.minimum(distances, (frames - seeds[-1]).square().sum(dim=-1))
        total = distances.cumsum(dim=0)
        at = total[-1] * torch.rand((), generator=generator).to(total.device)
        seeds.append(frames[torch.searchsorted(total, at).clamp(max=len(frames) - 1)])
    return torch.stack(seeds)


def _nearest(frames: Tensor, centers: Tensor) -> Tensor:
    squares = centers.square().sum(dim=-1)
    return torch.cat([(squares - 2 * part @ centers.T).argmin(dim=-1) for part in frames.split(16_384)])


@torch.no_grad()
def _relative_error(quantizer: Quantizer, frames: Tensor, num_refine: int = NUM_REFINE) -> float:
    return quantizer.relative_error(frames, quantizer.decode(quantizer.search(frames, num_refine))).item()


def measure(quantizer: Quantizer, frames: Tensor, num_train_frames: int) -> FitReport:
    """Measure a quantizer, and warn of codebooks that hardly use their entries.

    Args:
        quantizer: fitted.
        frames: held out, (frames, dim), float32.
        num_train_frames: for the report.
    """
    errors = [_relative_error(quantizer, frames, num_refine) for num_refine in range(NUM_REFINE + 1)]
    losses = index_entropy_losses(quantizer.search(frames), quantizer.codebook_size).tolist()
    for book, loss in enumerate(losses):
        if loss > STALLED_LOSS:
            logger.warning(
                "codebook %d of quantizer %s has stalled: it uses its %d entries as if it had %.0f (index-entropy loss "
                "%.3f, below 0.05 is good); fit it with start kmeans, on more frames, or for more steps",
                book,
                quantizer.id,
                quantizer.codebook_size,
                quantizer.codebook_size ** (1 - loss),
                loss,
            )
    return FitReport(errors, losses, num_train_frames, len(frames))
