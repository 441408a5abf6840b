"""The trainer on tar shards and on mixtures: both resume bit-equal inside an epoch, with loading processes."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TOKENS, tiny_whisper, write_tone
from torch.utils.data import ConcatDataset
from train import LossConfig, count_items, loss_terms

from speechkd.arguments import DistillationArguments
from speechkd.data.features import SAMPLE_RATE_HZ, WhisperLogMel
from speechkd.data.manifest import Manifest, read_manifest, write_manifest
from speechkd.data.mixture import MixtureSampler
from speechkd.data.sampler import DurationBatchSampler
from speechkd.data.shards import write_shards
from speechkd.data.stream import ShardStream, StreamSteps
from speechkd.data.whisper import WhisperTrainSet, collate_whisper
from speechkd.models.whisper import freeze_student, student_from_teacher
from speechkd.trainer import DistillationTrainer


def label(number: int) -> list[int]:
    return [*TOKENS.prefix, 500 + number, 501, TOKENS.end_of_text]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    rows = []
    for number in range(24):
        seconds = 0.5 + 0.05 * number
        write_tone(tmp_path / f"audio/{number}.wav", seconds, pitch_hz=200 + 20 * number)
        rows.append(
            {"id": str(number), "audio": f"audio/{number}.wav", "duration_seconds": seconds, "sample_rate_hz": 16_000}
        )
    write_manifest(tmp_path / "all.jsonl", rows)
    return read_manifest(tmp_path / "all.jsonl")


def make_trainer(output_dir: Path, train_dataset, sampler, **arguments) -> DistillationTrainer:
    teacher = tiny_whisper(decoder_layers=2)
    student = student_from_teacher(teacher, decoder_layers=1)
    freeze_student(student)
    settings = {"max_steps": 6, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1}
    settings |= {"disable_tqdm": True, "report_to": "none", "use_cpu": True}
    return DistillationTrainer(
        student,
        teacher,
        args=DistillationArguments(output_dir=str(output_dir), **settings, **arguments),
        train_dataset=train_dataset,
        collate=partial(collate_whisper, tokens=TOKENS),
        sampler=sampler,
        loss_terms=partial(loss_terms, weights=LossConfig(), log_mel=WhisperLogMel(), shared_encoder=None),
        count_items=count_items,
    )


def from_shards(manifest: Manifest, output_dir: Path, num_workers: int) -> DistillationTrainer:
    folder = manifest.path.parent / "shards"
    if not folder.exists():
        write_shards(manifest, folder, prefix="all", utterances_per_shard=6)

    def prepare(utterance, waveform):
        return {
            "id": utterance["id"],
            "duration_seconds": utterance["duration_seconds"],
            "token_ids": label(int(utterance["id"])),
            "waveform": waveform,
        }

    stream = ShardStream(
        sorted(folder.glob("*.tar")),
        prepare,
        max_batch_seconds=4.0,
        sample_rate_hz=SAMPLE_RATE_HZ,
        num_streams=max(num_workers, 1),
        buffer_size=8,
        num_buckets=2,
    )
    return make_trainer(output_dir, stream, StreamSteps(6), dataloader_num_workers=num_workers)


def from_mixture(manifest: Manifest, output_dir: Path, num_workers: int) -> DistillationTrainer:
    parts = [manifest.select(range(16)), manifest.select(range(16, 24))]
    corpora = [WhisperTrainSet(part, [label(int(key)) for key in part.ids]) for part in parts]
    samplers = [DurationBatchSampler(part.durations_seconds, 4.0, seed=number) for number, part in enumerate(parts)]
    sampler = MixtureSampler(samplers, [1.0, 2.0])
    return make_trainer(output_dir, ConcatDataset(corpora), sampler, dataloader_num_workers=num_workers)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("build", [from_shards, from_mixture])
def test_a_resumed_run_sees_the_batches_it_would_have_seen(manifest, tmp_path, build, num_workers):
    whole = build(manifest, tmp_path / "run", num_workers)
    whole.train()
    resumed = build(manifest, tmp_path / "run", num_workers)
    resumed.train(resume_from_checkpoint=tmp_path / "run/checkpoint-4")
    assert resumed.state.global_step == 6
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    log = [json.loads(line) for line in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    assert all(row["padding"] > 0.9 for row in log if "padding" in row)  # a second or so in Whisper's 30
