"""Memory and time of the fused losses against the plain ones. Launch: python tests/benchmarks/losses.py

Each step goes from hidden states to gradients of the student's hidden states and head, both dims alike. Ratios are to
the plain form in the same run. With `--readme` the table also goes between the marks of speechkd/losses/README.md.
"""

import re
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from measure import median_seconds, peak_extra_mib, pin_allocator
from torch import Tensor

from speechkd.doctor import hardware_name
from speechkd.losses import logits
from speechkd.losses.fused import fused_linear_distillation, fused_linear_divergence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(512, 51_865, 512), (512, 151_936, 512), *([(8_192, 128_256, 4_096)] if DEVICE == "cuda" else [])]
DIVERGENCES = ("forward_kl", "reverse_kl", "generalized_jsd", "skew_kl", "skew_reverse_kl", "total_variation")
README = Path(__file__).resolve().parents[2] / "speechkd/losses/README.md"
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


def compare(what: str, base: Callable[[], None], ours: Callable[[], None], rounds: int) -> str:
    """One row of the table."""
    seconds = median_seconds({"plain": base, "fused": ours}, rounds)
    memory = {"plain": peak_extra_mib(base), "fused": peak_extra_mib(ours)}
    return (
        f"| {what} | {memory['plain']:.0f} | {memory['fused']:.0f} | {memory['fused'] / memory['plain']:.2f} | "
        f"{seconds['plain']:.2f} | {seconds['fused']:.2f} | {seconds['fused'] / seconds['plain']:.2f} |"
    )


def main() -> None:
    kind = "wall" if DEVICE == "cuda" else "processor"
    lines = [
        f"{hardware_name(DEVICE)}, {date.today()}, `python tests/benchmarks/losses.py --readme`. MiB above the models; "
        f"{kind} seconds.",
        "",
        "| tokens x vocabulary x dim, loss | plain MiB | fused MiB | ratio | plain s | fused s | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines))
    for size in SIZES:
        rounds, shape = (5 if size == SIZES[0] else 3), "{:,} x {:,} x {:,}".format(*size)
        names = DIVERGENCES if size == SIZES[0] else ("forward_kl",)
        cases = [(name, make_step(plain(name), *size), make_step(fused(name), *size)) for name in names]
        cases.append(("CE + KL", make_step(plain_hinton, *size), make_step(fused_hinton, *size)))
        late, early = (make_step(loss, *size, scored=0.5) for loss in (plain_masking_late, fused("forward_kl")))
        cases.append(("forward_kl, half of the tokens masked", late, early))
        for name, base, ours in cases:
            lines.append(compare(f"{shape}, {name}", base, ours, rounds))
            print(lines[-1], flush=True)
    if "--readme" in sys.argv[1:]:
        text, table = README.read_text(encoding="utf-8"), "\n".join(lines)
        marks = r"(?s)<!-- measured -->.*<!-- /measured -->"
        README.write_text(
            re.sub(marks, lambda _: f"<!-- measured -->\n{table}\n<!-- /measured -->", text), encoding="utf-8"
        )


if __name__ == "__main__":
    pin_allocator()
    main()
