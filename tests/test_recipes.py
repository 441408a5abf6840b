"""Every recipe on a tiny random teacher and generated audio: two steps, scores, and a student for stock tools."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import train
from conftest import ROOT, write_tone
from evaluate import main as evaluate
from safetensors.torch import load_file

from speechkd.data.manifest import write_manifest
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.labels.teacher_cache import LabelStoreError
from speechkd.models.whisper import student_from_teacher
from speechkd.teachers import load_whisper

YAMLS = sorted((ROOT / "recipes/distil_whisper").glob("*.yaml"))
FSDD = ROOT / "recipes/distil_whisper/fsdd.yaml"
pytestmark = pytest.mark.recipe


@pytest.fixture(scope="session")
def label_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of the tones, made by the first test that wants them."""
    return tmp_path_factory.mktemp("labels") / "store"


@pytest.fixture
def labels(tiny_teacher: str, tone_manifest: Path, label_cache: Path) -> Path:
    folder = tone_manifest.parent / "labels"
    if not label_cache.exists():
        decoding, targets = DecodingConfig(max_new_tokens=6), ("text", "encoder_states", "decoder_states")
        label_manifest(tiny_teacher, tone_manifest, label_cache, decoding=decoding, targets=targets)
    for split in ("train", "test"):
        shutil.copytree(label_cache, folder / split)
    return folder


def arguments(path: Path, teacher: str, manifest: Path, labels: Path, *more: str) -> list[str]:
    options = {
        "teacher.name": teacher,
        "data.train_manifest": manifest,
        "data.test_manifest": manifest,
        "data.labels_dir": labels,
        "data.max_batch_seconds": 60,
        "data.num_workers": 0,
        "decoding.language": "en",
        "decoding.max_new_tokens": 6,
        "decoding.num_workers": 0,
        "filters.max_wer": "null",
        "filters.min_mean_logprob": "null",
        "filters.max_compression_ratio": "null",
        "filters.max_repeated_5grams": "null",
        "filters.drop_unfinished": "false",  # a random teacher never ends
        "trainer.output_dir": manifest.parent / "run",
        "trainer.max_steps": 2,
        "trainer.save_steps": 1,
        "trainer.bf16": "false",
        "trainer.dataloader_num_workers": 0,
        "trainer.use_cpu": "true",
    }
    given = [f"--{key}={value}" for key, value in options.items()]
    return ["--config", str(path), *given, *more]


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_recipe_trains_two_steps(path, tiny_teacher, tone_manifest, labels):
    train.main(arguments(path, tiny_teacher, tone_manifest, labels))
    run = tone_manifest.parent / "run"
    before, after = (load_file(run / name / "model.safetensors") for name in ("student_init", "student"))
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and not any(".encoder." in name or "decoder.embed_positions" in name for name in moved)
    card = (run / "student/README.md").read_text()
    assert "weights SHA-256" in card and "0.8 CE + 1 KL(" in card and "teacher, T=2, T^2)" in card


def test_a_student_is_scored_and_loads_in_stock_transformers(tiny_teacher, tone_manifest, labels):
    argv = arguments(FSDD, tiny_teacher, tone_manifest, labels)
    train.main(argv)
    evaluate(argv)
    run = tone_manifest.parent / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["num_utterances"] == 6 and metrics["rtfx"] > 0 and "digit_error_rate" in metrics
    assert (run / "hypotheses.jsonl").read_text().count("\n") == 6
    assert "| student after |" in (run / "student/README.md").read_text()
    code = (
        "import sys, numpy\n"
        "from transformers import WhisperForConditionalGeneration, pipeline\n"
        "model = WhisperForConditionalGeneration.from_pretrained(sys.argv[1])\n"
        "heads = model.generation_config.alignment_heads\n"
        "assert all(layer < model.config.decoder_layers for layer, _ in heads), heads\n"
        "speak = pipeline('automatic-speech-recognition', model=sys.argv[1])\n"
        "speak(numpy.zeros(16000, dtype=numpy.float32), generate_kwargs={'max_new_tokens': 4})\n"
        "assert 'speechkd' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(run / "student")], check=True, cwd=tone_manifest.parent)


def test_live_encoders_give_the_loss_of_cached_states(tiny_teacher, tone_manifest, labels):
    losses = []
    for cached in ("true", "false"):
        run = tone_manifest.parent / f"cached-{cached}"
        more = (f"--trainer.output_dir={run}", f"--teacher.cache_encoder_states={cached}", "--trainer.logging_steps=1")
        train.main(arguments(FSDD, tiny_teacher, tone_manifest, labels, *more))
        losses.append(
            [json.loads(line).get("loss/total") for line in (run / "train_log.jsonl").read_text().splitlines()]
        )
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=2e-3)  # the states are stored in float16


def test_training_without_a_teacher_uses_the_manifests_text(tiny_teacher, tone_manifest):
    argv = arguments(FSDD, tiny_teacher, tone_manifest, tone_manifest.parent / "none")
    argv = [item for item in argv if not item.startswith(("--teacher.name", "--data.labels_dir"))]
    train.main(
        [*argv, "--teacher=null", "--data.labels_dir=null", f"--student.init_from={tiny_teacher}", "--loss.kl=0"]
    )
    assert "None; fine-tuned on its labels." in (tone_manifest.parent / "run/student/README.md").read_text()


def test_labels_of_another_teacher_are_refused(tiny_teacher, tone_manifest, labels):
    header = labels / "train/header.json"
    header.write_text(header.read_text().replace('"weights_sha256": "', '"weights_sha256": "0'))
    with pytest.raises(LabelStoreError, match="come from teacher .* but this run has"):
        train.main(arguments(FSDD, tiny_teacher, tone_manifest, labels))


def test_the_best_student_on_the_development_set_is_kept(tiny_teacher, tone_manifest, labels):
    (labels / "dev").symlink_to(labels / "test")
    options = {
        "data.dev_manifest": tone_manifest,
        "trainer.eval_strategy": "steps",
        "trainer.eval_steps": 1,
        "trainer.load_best_model_at_end": "true",
        "trainer.save_total_limit": 1,
        "trainer.learning_rate": 100.0,  # the second step can only make it worse
    }
    more = [f"--{key}={value}" for key, value in options.items()]
    train.main(arguments(FSDD, tiny_teacher, tone_manifest, labels, *more))
    run = tone_manifest.parent / "run"
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    evaluations = {row["step"]: row["eval_loss"] for row in log if "eval_loss" in row}
    best = min(evaluations, key=evaluations.get)
    kept = load_file(run / f"checkpoint-{best}/model.safetensors")
    student = load_file(run / "student/model.safetensors")
    assert len(evaluations) == 2 and all(student[name].equal(weight) for name, weight in kept.items())


def test_training_on_labels_that_are_not_finished_is_refused(tiny_teacher, tone_manifest, labels):
    more = [
        {"id": f"more-{n}", "audio": "audio/0.wav", "duration_seconds": 1.0, "sample_rate_hz": 16_000} for n in range(2)
    ]
    with tone_manifest.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in more)
    with pytest.raises(ValueError, match="2 of 8 utterances have no label in .*max_skipped_fraction=0.01; finish"):
        train.main(arguments(FSDD, tiny_teacher, tone_manifest, labels))
    more = ("--data.max_skipped_fraction=0.3", f"--trainer.output_dir={tone_manifest.parent / 'allowed'}")
    train.main(arguments(FSDD, tiny_teacher, tone_manifest, labels, *more))


def test_windows_are_trained_on_with_timestamps_and_the_text_before(tiny_teacher, tmp_path):
    rows = []
    for index in range(5):
        write_tone(tmp_path / f"{index}.wav", 12.0, pitch_hz=200 + 50 * index)
        row = {"id": f"clip-{index}", "audio": f"{index}.wav", "duration_seconds": 12.0, "sample_rate_hz": 16_000}
        rows.append({**row, "text": "a tone"})
    write_manifest(tmp_path / "clips.jsonl", rows)
    decoding = DecodingConfig(max_new_tokens=6, timestamps=True)
    options = {"decoding": decoding, "targets": ("text", "encoder_states", "decoder_states"), "pack": True}
    label_manifest(tiny_teacher, tmp_path / "clips.jsonl", tmp_path / "labels/train", **options)
    more = ["--data.pack=true", "--decoding.timestamps=true", "--data.timestamp_probability=0.5"]
    more += ["--data.previous_text_probability=1.0", "--filters.drop_all_caps=false", "--teacher.stored_outputs=null"]
    train.main(arguments(FSDD, tiny_teacher, tmp_path / "clips.jsonl", tmp_path / "labels", *more))
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["train_utterances"] == 3 and run["train_hours"] == pytest.approx(60 / 3600)


def test_a_run_may_start_from_another_student_on_the_teachers_encoder_states(tiny_teacher, tone_manifest, labels):
    other = tone_manifest.parent / "other"
    student_from_teacher(load_whisper(tiny_teacher), decoder_layers=1).save_pretrained(other)
    train.main(arguments(FSDD, tiny_teacher, tone_manifest, labels, f"--student.init_from={other}"))
    run = tone_manifest.parent / "run"
    before, started = load_file(other / "model.safetensors"), load_file(run / "student_init/model.safetensors")
    assert all(started[name].equal(weight) for name, weight in before.items())
    assert json.loads((run / "run.json").read_text())["decoder_layers"] == 1


def test_a_language_that_the_teacher_lacks_is_refused(tiny_teacher, tone_manifest):
    given = arguments(FSDD, tiny_teacher, tone_manifest, tone_manifest.parent / "none", "--decoding.language=gem")
    with pytest.raises(ValueError, match=f"teacher .*{Path(tiny_teacher).name}.* does not know the language 'gem'"):
        train.main(given)


def test_corpora_of_two_languages_share_the_steps(tiny_teacher, tone_manifest, labels):
    german = tone_manifest.parent / "labels-de"
    decoding = DecodingConfig(max_new_tokens=6, language="de")
    label_manifest(
        tiny_teacher,
        tone_manifest,
        german / "train",
        decoding=decoding,
        targets=("text", "encoder_states", "decoder_states"),
    )
    corpora = f"[{{train_manifest: {tone_manifest}, labels_dir: {german}, language: de, weight: 1}}]"
    more = [f"--data.extra_corpora={corpora}", "--trainer.max_steps=4", "--trainer.save_steps=2"]
    argv = arguments(FSDD, tiny_teacher, tone_manifest, labels, *more)
    train.main(argv)
    run = tone_manifest.parent / "run"
    facts = json.loads((run / "run.json").read_text())
    assert facts["language"] == ["de", "en"] and facts["train_utterances"] == 12
    assert "language: ['de', 'en']" in (run / "student/README.md").read_text()
    trained = load_file(run / "student/model.safetensors")
    for name in ("run.json", "student"):  # as if the run had been killed after step 2
        (run / name).rename(run / f"first-{name}")
    for step in (3, 4):
        if (run / f"checkpoint-{step}").exists():
            (run / f"checkpoint-{step}").rename(run / f"first-{step}")
    began = (run / "checkpoint-2/model.safetensors").stat().st_mtime_ns
    train.main(argv)
    assert (run / "checkpoint-2/model.safetensors").stat().st_mtime_ns == began  # it went on from there
    resumed = load_file(run / "student/model.safetensors")
    assert all(resumed[name].equal(weight) for name, weight in trained.items())
