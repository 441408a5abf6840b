"""The code of the page on data runs, one block after the other, on real files."""

import re
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import speechkd.data.hub as hub
import speechkd.data.mixture as mixture
import speechkd.data.stream as stream

README = Path(__file__).resolve().parents[1] / "speechkd/data/README.md"


def test_the_code_of_the_page_gives_features_of_every_clip(tone_manifest, monkeypatch):
    monkeypatch.chdir(tone_manifest.parent)
    blocks = re.findall(r"```python\n(.+?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert isinstance(names["loader"], DataLoader)
    assert names["features"].shape[1:] == (80, 3000) and names["features"].dtype == torch.float32
    assert sum(len(batch["num_samples"]) for batch in names["loader"]) == 6


def test_what_the_table_names_exists():
    page = README.read_text(encoding="utf-8")
    for module, name in ((hub, "read_utterances"), (hub, "stream_hub_dataset"), (stream, "ShardStream")):
        assert f"{name}(" in page and hasattr(module, name)
    assert "MixtureSampler(" in page and hasattr(mixture, "MixtureSampler")
