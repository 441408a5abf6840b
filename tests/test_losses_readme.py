"""Every line of code in the table of losses runs and gives a finite loss."""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

README = Path(__file__).resolve().parents[1] / "speechkd/losses/README.md"
MODULES = [path.stem for path in README.parent.glob("*.py") if path.stem not in ("__init__", "chunk_terms")]
LINES = re.findall(r"\| `(.+)` \|$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)


def names() -> dict:
    """What the page says its letters are, and all public names of the losses."""
    torch.manual_seed(0)
    everything = {}
    for module in MODULES:
        path = f"speechkd.losses.{module}"
        members = vars(import_module(path)).items()
        everything |= {name: value for name, value in members if getattr(value, "__module__", "") == path}
    labels = torch.randint(0, 11, (2, 6))
    return everything | {
        "s": torch.randn(2, 6, 11, requires_grad=True),
        "t": torch.randn(2, 6, 11),
        "mask": torch.ones(2, 6, dtype=torch.bool),
        "labels": labels,
        "ids": labels,
        "codes": torch.randint(0, 16, (2, 6, 4)),
        "hs": torch.randn(2, 6, 8, requires_grad=True),
        "ht": torch.randn(2, 6, 8),
        "ws": torch.randn(11, 8),
        "wt": torch.randn(11, 8),
        "vs": torch.randn(5, 8, requires_grad=True),
        "vt": torch.randn(5, 8),
        "qs": torch.randn(2, 2, 6, 6, requires_grad=True),
        "qt": torch.randn(2, 2, 6, 6),
        "values": torch.randn(2, 6, 8),
        "ls": torch.randn(2, 2, 6, 8, requires_grad=True),
        "lt": torch.randn(2, 2, 6, 8),
        "ends": torch.arange(1, 7).expand(2, 6),
        "spelt": [bytes([97 + token]) for token in range(11)],
        **{f"{ref}{which}": torch.randn(4).abs().neg() for ref in ("", "ref_") for which in ("better", "worse")},
    }


def test_the_table_has_every_loss():
    page = README.read_text(encoding="utf-8")
    public = import_module("speechkd.losses.logits").__all__
    assert len(LINES) > 50
    assert [name for name in public if f"{name}(" not in page] == []


@pytest.mark.parametrize("line", LINES)
def test_the_line_runs_and_gives_a_finite_loss(line):
    result = eval(line, names())
    if line.startswith(("AdaptiveOffPolicy", "GkdPolicy")):
        assert result == "dataset" or result[-1] in ("student", "dataset")
        return
    parts = [part for part in (result if isinstance(result, tuple) else (result,)) if isinstance(part, Tensor)]
    assert parts and all(part.ndim == 0 and part.isfinite() for part in parts)
