"""What the tests of recipes/segue, understanding, share: orders of coffee as tones, and small encoders."""

import sys

import torch
from conftest import ROOT, write_tone
from transformers import (
    WhisperConfig,
    WhisperModel,
)

sys.path.append(str(ROOT / "recipes/segue"))  # behind the others: its train.py is loaded by path

from heads import (
    Machine,
)
from understanding_tasks import (
    UnderstandingConfig,
)

from speechkd.data.manifest import read_manifest, write_manifest
from speechkd.models.segue import SegueEncoder

DRINKS, SIZES = ("mocha", "latte", "espresso"), ("small", "large")
RATE_HZ = 16_000
CPU = Machine(use_cpu=True)


def config(task="slots", **changes):
    return UnderstandingConfig(**{"task": task, "head_steps": 60, "seeds": [37, 38], "k": [1, 2], **changes})


def orders(num=24):
    """Drinks, each in both sizes or in none, in turn."""
    rows = [{"drink": DRINKS[index % 3], "size": (*SIZES, None)[index // 3 % 3]} for index in range(num)]
    return [{name: value for name, value in row.items() if value} for row in rows]


def write_orders(folder, name, labels, seconds=0.3, audio=True):
    """A manifest of tones whose pitch tells the drink and whose length the size."""
    rows = []
    for index, slots in enumerate(labels):
        drink, size = DRINKS.index(slots["drink"]), (*SIZES, None).index(slots.get("size"))
        key, length = f"{name}-{index:02d}", seconds + 0.1 * size
        path = folder / f"audio/{key}.wav"
        if audio:
            write_tone(path, length, pitch_hz=200 * (1 + drink) + index)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        rows.append(
            {
                "id": key,
                "audio": f"audio/{key}.wav",
                "duration_seconds": length,
                "sample_rate_hz": RATE_HZ,
                "intent": "order",
                "text": " ".join(slots.values()),
                "slots": [{"name": slot, "value": value} for slot, value in slots.items()],
            }
        )
    write_manifest(folder / f"{name}.jsonl", rows)
    return folder / f"{name}.jsonl"


def write_rows(folder, *fields):
    """A manifest of one shared tone with these fields."""
    write_tone(folder / "tone.wav", 0.2)
    shared = {"audio": "tone.wav", "duration_seconds": 0.2, "sample_rate_hz": RATE_HZ}
    write_manifest(folder / "rows.jsonl", [{"id": f"row-{i}", **shared, **row} for i, row in enumerate(fields)])
    return read_manifest(folder / "rows.jsonl")


def slots(**values):
    return {"slots": [{"name": name, "value": value} for name, value in values.items()]}


def whisper_student(num_frozen_layers=0, **arguments):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 9}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 8, "begin_suppress_tokens": None}
    model = WhisperModel(WhisperConfig(**sizes, **ids))
    return SegueEncoder(model.encoder, grid_seconds=0.2, num_frozen_layers=num_frozen_layers, **arguments).eval()


def perfect_vectors(ids, labels, dim=12, seed=0):
    """One direction for each value of each slot, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    values = sorted({value for row in labels for value in row.values()})
    vectors = {}
    for key, row in zip(ids, labels, strict=True):
        vector = 0.05 * torch.randn(dim, generator=generator)
        for value in row.values():
            vector[values.index(value)] += 3.0
        vectors[key] = vector
    return vectors


def weights_of(module):
    return {name: weight.clone() for name, weight in module.state_dict().items()}
