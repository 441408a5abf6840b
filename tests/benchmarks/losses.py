"""Memory and time of the fused losses against the plain ones. Launch: python tests/benchmarks/losses.py

Each step goes from hidden states to gradients of the student's hidden states and head, both dims alike. Prints one line
per claim, as ratios to the plain form of the same run.
"""

from collections.abc import Callable

import torch
from measure import median_seconds, peak_extra_mib, pin_allocator
from torch import Tensor

from speechkd.doctor import hardware_name
from speechkd.losses import logits
from speechkd.losses.fused import fused_linear_distillation, fused_linear_divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(512, 51_865, 512), (512, 151_936, 512), *([(8_192, 128_256, 4_096)] if DEVICE == "cuda" else [])]
DIVERGENCES = ("forward_kl", "reverse_kl", "generalized_jsd", "skew_kl", "skew_reverse_kl", "total_variation")
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def make_step(loss: Loss, num_tokens: int, vocabulary: int, dim: int, scored: float = 1.0) -> Callable[[], None]:
    """One forward and backward pass."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype)

    hidden = randn(4, num_tokens // 4, dim).requires_grad_()
    weight = (randn(vocabulary, dim) / dim**0.5).requires_grad_()
    teacher_hidden, teacher_weight = randn(4, num_tokens // 4, dim), randn(vocabulary, dim) / dim**0.5
    mask = torch.rand(4, num_tokens // 4, generator=generator, device=DEVICE) < scored
    labels = torch.randint(0, vocabulary, mask.shape, generator=generator, device=DEVICE).masked_fill(~mask, -100)

    def step() -> None:
        loss(hidden, weight, teacher_hidden, teacher_weight, mask, labels).backward()
        hidden.grad = weight.grad = None

    return step


def plain(name: str) -> Loss:
    return lambda hs, ws, ht, wt, mask, labels: getattr(logits, name)(hs @ ws.T, ht @ wt.T, mask)


def plain_masking_late(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """As public code does: all tokens to the end, then a product with the mask."""
    log_q, log_p = (hs @ ws.T).float().log_softmax(-1), (ht @ wt.T).float().log_softmax(-1)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * mask).sum() / mask.sum()


def fused(name: str) -> Loss:
    return lambda hs, ws, ht, wt, mask, labels: fused_linear_divergence(hs, ws, ht, wt, mask, divergence=name)


def plain_hinton(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    return logits.hinton_kd(hs @ ws.T, ht @ wt.T, labels=labels, temperature=2.0)


def fused_hinton(hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    return fused_linear_distillation(hs, ws, ht, wt, labels, temperature=2.0)[0]


def compare(what: str, base: Callable[[], None], ours: Callable[[], None], rounds: int) -> None:
    seconds = median_seconds({"plain": base, "fused": ours}, rounds)
    memory = {"plain": peak_extra_mib(base), "fused": peak_extra_mib(ours)}
    print(
        f"{what}: memory {memory['fused'] / memory['plain']:.2f} ({memory['fused']:.0f} of {memory['plain']:.0f} MiB), "
        f"time {seconds['fused'] / seconds['plain']:.2f} ({seconds['fused']:.2f} of {seconds['plain']:.2f} s)",
        flush=True,
    )


def main() -> None:
    print(f"{hardware_name(DEVICE)}; seconds of {'wall' if DEVICE == 'cuda' else 'processor'} time")
    for size in SIZES:
        rounds = 5 if size == SIZES[0] else 3
        shape = "{} tokens x {} x {}".format(*size)
        for name in DIVERGENCES if size == SIZES[0] else ("forward_kl",):
            compare(f"{shape}, {name}", make_step(plain(name), *size), make_step(fused(name), *size), rounds)
        compare(f"{shape}, CE + KL", make_step(plain_hinton, *size), make_step(fused_hinton, *size), rounds)
        half = make_step(plain_masking_late, *size, scored=0.5), make_step(fused("forward_kl"), *size, scored=0.5)
        compare(f"{shape}, forward_kl, half of the tokens masked", *half, rounds)


if __name__ == "__main__":
    pin_allocator()
    main()
