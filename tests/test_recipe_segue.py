"""recipes/segue on tiny random models and generated audio: texts, vectors, training, retrieval, commands."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, write_tone
from recipe_runs import forget_the_end, run_sh, student_of
from safetensors.torch import load_file
from test_labels_embeddings import make_folder
from test_models_segue import make_model, save_model
from torch import nn
from transformers import get_linear_schedule_with_warmup

sys.path.append(str(ROOT / "recipes/segue"))  # behind the others: its train.py is loaded by path

import evaluate_embeddings
import store_targets
from embedding_objective import LossConfig, count_items, loss_terms
from sentence_corpora import (
    DataConfig,
    SentenceSet,
    collate_sentences,
    heard_seconds,
    lengthened,
    open_embeddings,
    open_states,
    spoken_texts,
    tell_cut,
    text_vectors,
)

from speechkd.check_config import check_config
from speechkd.config import parse_config
from speechkd.data.manifest import read_manifest, write_manifest
from speechkd.estimate import load_recipe
from speechkd.labels.embeddings import cache_lower_states, embed_texts
from speechkd.labels.filters import FilterConfig
from speechkd.labels.teacher_cache import LabelStoreError, create_store
from speechkd.metrics.retrieval import retrieval_scores
from speechkd.models.speech_embedder import SpeechEmbedder, load_segue
from speechkd.teachers_text import load_sentence_teacher

RECIPE = ROOT / "recipes/segue"
YAMLS = sorted(RECIPE.glob("*.yaml"))
TEXTS = ["a small coffee", "a tone", "order a tone", "order a small coffee", "coffee", "a tone"]
train = load_recipe(RECIPE / "train.py")


@pytest.fixture(scope="session")
def sentence_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random BERT of width 16."""
    return make_folder(tmp_path_factory.mktemp("sentences") / "bert", max_seq_length=8)


@pytest.fixture(scope="session")
def wav2vec2_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random wav2vec 2.0 of width 32 with layerdrop and dropout off."""
    quiet = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)
    folder = tmp_path_factory.mktemp("wav2vec2") / "tiny"
    save_model(make_model("wav2vec2", **quiet), folder)
    return str(folder)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Six clips of 1 to 2 s with five different texts."""
    rows = []
    for index, text in enumerate(TEXTS):
        write_tone(tmp_path / f"audio/{index}.wav", 1.0 + 0.2 * index, pitch_hz=200 + 50 * index)
        clip = {"id": f"clip-{index}", "audio": f"audio/{index}.wav", "duration_seconds": 1.0 + 0.2 * index}
        rows.append({**clip, "sample_rate_hz": 16_000, "text": text, "intent": text.split()[0]})
    write_manifest(tmp_path / "clips.jsonl", rows)
    return tmp_path / "clips.jsonl"


def data_of(manifest: Path, **changes: Any) -> DataConfig:
    return DataConfig(**({"train_manifest": str(manifest), "test_manifest": str(manifest)} | changes))


def batch_of(manifest: Path, **options: Any) -> dict[str, Any]:
    utterances = read_manifest(manifest)
    clips = SentenceSet(utterances, TEXTS, utterances.durations_seconds, **options)
    return collate_sentences([clips[index] for index in range(len(clips))])


class Fixed(nn.Module):
    """Stands for a student whose vectors are known."""

    def __init__(self, vectors: list[list[float]]) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.tensor(vectors))

    def forward(self, waveforms: torch.Tensor, num_samples: torch.Tensor) -> torch.Tensor:
        return self.vectors


# the objective


def test_mse_of_a_batch_is_the_element_mean_times_its_clips():
    batch = {"ids": ["a", "b"], "num_samples": [1, 1], "waveforms": torch.zeros(2, 1)}
    batch["embeddings"] = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
    student = Fixed([[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    loss, terms = loss_terms(student, None, batch, weights=LossConfig())
    mean = (loss / count_items(batch)).item()
    assert mean == pytest.approx(1.0) and terms["mse"] == loss.detach()
    assert 3 * mean == pytest.approx((1 + 5) / 2)  # the paper's squared norms, 1 and 5
    cosines = [0.0, -1 / math.sqrt(2)]
    assert terms["positive_cosine"].item() == pytest.approx(sum(cosines))


@pytest.mark.parametrize("objective", ["mse", "cosine", "info_nce"])
def test_stored_vectors_give_the_loss_and_gradients_of_the_live_teacher(objective, manifest, sentence_model, tmp_path):
    teacher = load_sentence_teacher(sentence_model)
    store, _ = embed_texts(teacher, zip(read_manifest(manifest).ids, TEXTS, strict=True), tmp_path / "vectors")
    student = load_segue(str(save_tiny_whisper(tmp_path)), embedding_dim=16, grid_seconds=0.64)
    weights, results = LossConfig(objective=objective), []
    for options, live in (({"embeddings": store}, None), ({}, teacher)):
        student.zero_grad()
        batch = batch_of(manifest, **options)
        assert ("texts" in batch) == (live is not None)
        loss, terms = loss_terms(student, live, batch, weights=weights)
        loss.backward()
        results.append((loss.detach(), terms["positive_cosine"], student.stack.conv1.weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1])
    assert results[0][2].abs().max() > 0


def save_tiny_whisper(folder: Path) -> Path:
    save_model(make_model("whisper", dropout=0.0), folder / "whisper")
    return folder / "whisper"


def test_a_batch_without_vectors_and_teacher_is_refused(manifest):
    with pytest.raises(ValueError, match="no vectors of the teacher and there is no teacher"):
        loss_terms(Fixed([[1.0]]), None, batch_of(manifest), weights=LossConfig())


def test_a_silent_clip_gives_a_finite_loss_and_finite_gradients(tmp_path, wav2vec2_folder):
    soundfile.write(tmp_path / "silence.wav", np.zeros(16_000, dtype=np.float32), 16_000)
    row = {"id": "silence", "audio": "silence.wav", "duration_seconds": 1.0, "sample_rate_hz": 16_000, "text": "a"}
    write_manifest(tmp_path / "silence.jsonl", [row])
    clip = SentenceSet(read_manifest(tmp_path / "silence.jsonl"), ["a"], np.ones(1))[0]
    batch = collate_sentences([{**clip, "embedding": torch.ones(32)}])
    student = load_segue(wav2vec2_folder)
    loss, _ = loss_terms(student, None, batch, weights=LossConfig())
    loss.backward()
    gradients = [weight.grad for weight in student.parameters() if weight.grad is not None]
    assert loss.isfinite() and gradients and all(gradient.isfinite().all() for gradient in gradients)


# texts, vectors, clips


def test_empty_and_missing_texts_are_left_out_and_counted(manifest, caplog):
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[1]["text"], rows[4]["text"] = None, "  "
    write_manifest(manifest, rows)
    texts, report = spoken_texts(data_of(manifest), "train", read_manifest(manifest))
    assert list(texts) == ["clip-0", "clip-2", "clip-3", "clip-5"] and report == {"num_without_text": 2}
    assert "2 of 6 utterances" in caplog.text and "first: 'clip-1'" in caplog.text
    write_manifest(manifest, [{**row, "text": None} for row in rows])
    with pytest.raises(ValueError, match="none of 6 utterances .* has a text; set data.labels_dir and label"):
        spoken_texts(data_of(manifest), "train", read_manifest(manifest))


def label_store(folder: Path, said: dict[str, str], **header: Any) -> Path:
    store = create_store(folder, {"teacher": {"name": "t", "weights_sha256": "0"}, "targets": ["text"]} | header)
    scores = {"mean_logprob": -0.1, "compression_ratio": 1.0, "finished": True, "duration_seconds": 1.0}
    store.write_shard([{"id": key, "text": text, **scores} for key, text in said.items()], {})
    return folder


def test_transcripts_of_a_label_store_replace_the_text_and_are_filtered_for_training_alone(manifest, tmp_path):
    said = {f"clip-{index}": f"coffee {index}" for index in range(6)} | {"clip-2": "", "clip-3": "ORDER"}
    label_store(tmp_path / "labels/train", {**said, "elsewhere": "a"})
    data, utterances = data_of(manifest, labels_dir=str(tmp_path / "labels")), read_manifest(manifest)
    texts, report = spoken_texts(data, "train", utterances, FilterConfig())
    assert texts == {f"clip-{index}": f"coffee {index}" for index in (0, 1, 4, 5)}
    assert report["num_without_text"] == 1 and report["filters"]["dropped"] == {"drop_all_caps": 1, "drop_empty": 1}
    unfiltered, _ = spoken_texts(data, "train", utterances)
    assert unfiltered == {key: text for key, text in said.items() if text}


def test_label_stores_that_do_not_fit_are_refused(manifest, tmp_path):
    data, utterances = data_of(manifest, labels_dir=str(tmp_path / "labels")), read_manifest(manifest)
    with pytest.raises(LabelStoreError, match="holds no label store"):
        spoken_texts(data, "train", utterances)
    label_store(tmp_path / "labels/train", {"clip-0": "a tone"})
    with pytest.raises(ValueError, match="5 of 6 utterances .* have no label in .*max_skipped_fraction=0.01; finish"):
        spoken_texts(data, "train", utterances)
    label_store(tmp_path / "labels/test", {"clip-0": "a tone"}, decoding={"pack": True})
    with pytest.raises(LabelStoreError, match="are of windows"):
        spoken_texts(data, "test", utterances)


def test_vectors_of_another_teacher_scale_or_text_are_refused(sentence_model, tmp_path):
    teacher = load_sentence_teacher(sentence_model)
    texts = {"one": "a tone", "two": "coffee"}
    embed_texts(teacher, texts.items(), tmp_path / "vectors")
    open_embeddings(tmp_path / "vectors", teacher, texts)
    with pytest.raises(LabelStoreError, match="'two', 'a coffee', and holds that of 'coffee'"):
        open_embeddings(tmp_path / "vectors", teacher, {**texts, "two": "a coffee"})
    with pytest.raises(LabelStoreError, match="'three', 'a', and holds none; run the embed stage"):
        open_embeddings(tmp_path / "vectors", teacher, {**texts, "three": "a"})
    with pytest.raises(LabelStoreError, match="normalize was False, now True"):
        open_embeddings(tmp_path / "vectors", load_sentence_teacher(sentence_model, normalize=True), texts)
    other = load_sentence_teacher(make_folder(tmp_path / "other", seed=1))
    with pytest.raises(LabelStoreError, match="come from teacher"):
        open_embeddings(tmp_path / "vectors", other, texts)
    label_store(tmp_path / "labels", texts)
    with pytest.raises(LabelStoreError, match="keeps no embeddings"):
        open_embeddings(tmp_path / "labels", teacher, texts)


def test_states_of_other_windows_are_refused(manifest, tmp_path):
    folder = str(save_tiny_whisper(tmp_path))
    load = partial(load_segue, folder, num_frozen_layers=1)
    cache_lower_states(load(grid_seconds=0.64), folder, manifest, tmp_path / "states")
    open_states(tmp_path / "states", load(grid_seconds=0.64), folder)
    with pytest.raises(LabelStoreError, match="'grid_seconds': 0.64.* take another student.lower_states_dir"):
        open_states(tmp_path / "states", load(grid_seconds=1.0), folder)


def test_vectors_of_texts_come_in_order_once_for_each_text_and_equal_the_stored_ones(sentence_model, tmp_path):
    teacher = load_sentence_teacher(sentence_model)
    texts = {f"clip-{index}": text for index, text in enumerate(TEXTS)}
    embed_texts(teacher, texts.items(), tmp_path / "vectors")
    live = text_vectors(teacher, texts, None, batch_size=2)
    torch.testing.assert_close(live, torch.cat([teacher([text]) for text in TEXTS]), rtol=0, atol=1e-5)
    assert live[1].equal(live[5])
    torch.testing.assert_close(text_vectors(teacher, texts, tmp_path / "vectors"), live, rtol=0, atol=1e-5)


def test_texts_that_the_teacher_cuts_are_counted(sentence_model, caplog):
    teacher = load_sentence_teacher(sentence_model)
    assert tell_cut(teacher, ["a tone", "a " * 6]) == 0 and not caplog.records
    assert tell_cut(teacher, ["a tone", "a " * 7]) == 1
    assert "1 of 2 texts are longer than the teacher's 8 tokens and are cut; the longest has 9" in caplog.text


def test_short_clips_get_silence_on_both_sides_and_long_ones_end_at_the_window(manifest):
    clip = torch.tensor([1, 2, 3], dtype=torch.int16)
    assert lengthened(clip, 6).tolist() == [0, 1, 2, 3, 0, 0] and lengthened(clip, 3) is not None
    assert lengthened(clip, 2).tolist() == [1, 2, 3]
    batch = batch_of(manifest, min_samples=20_000, max_samples=24_000)
    assert batch["num_samples"] == [20_000, 20_000, 22_400, 24_000, 24_000, 24_000]
    assert batch["waveforms"].dtype == torch.int16 and batch["waveforms"].shape == (6, 30_720)
    assert batch["audio_seconds"] == pytest.approx(9.0) and batch["padded_seconds"] == pytest.approx(12.0)


def test_a_whisper_computes_its_window_and_others_the_clip(wav2vec2_folder, tmp_path):
    durations, folder = np.array([0.5, 1.0, 1.29, 30.0]), str(save_tiny_whisper(tmp_path))
    assert heard_seconds(load_segue(folder, grid_seconds=0.64), durations).tolist() == [0.64, 1.28, 1.92, 30.0]
    assert heard_seconds(load_segue(folder), durations).tolist() == [30.0] * 4
    assert heard_seconds(load_segue(wav2vec2_folder), durations) is durations


# configurations


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_is_a_configuration(path):
    config, _ = parse_config(train.SegueConfig, ["--config", str(path), "--trainer.use_cpu=true"])
    assert config.trainer.output_dir == f"exp/segue/{path.stem}" and config.trainer.max_steps > 0
    assert (config.understanding is None) == (path.stem == "librispeech")


def test_all_promised_datasets_have_a_recipe():
    promised = "barista fluent_speech_commands fsdd librispeech meld minds14 quickstart slurp stop".split()
    assert [path.stem for path in YAMLS] == promised


def test_the_librispeech_recipe_has_the_papers_schedule():
    argv = ["--config", str(RECIPE / "librispeech.yaml"), "--trainer.use_cpu=true", "--trainer.bf16=false"]
    config, _ = parse_config(train.SegueConfig, argv)
    args = config.trainer
    assert args.max_steps == 10 * math.ceil(math.ceil(281_241 / 2) / 8) == 175_780
    assert config.data.max_batch_size == 8 and args.lr_scheduler_type == "linear"
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.999, 0.0, 1.0)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    factor = get_linear_schedule_with_warmup(optimizer, int(args.warmup_steps), args.max_steps).lr_lambdas[0]
    rates = {step: args.learning_rate * factor(step) for step in (0, 1, 2500, 5000, 90_000, 175_780)}
    assert rates == pytest.approx({0: 0, 1: 6e-9, 2500: 1.5e-5, 5000: 3e-5, 90_000: 1.5068509e-5, 175_780: 0})
    saved = range(int(args.save_steps), args.max_steps, int(args.save_steps))
    assert len(saved) == 35 and list(saved)[-args.average_last :] == list(range(130_000, 175_001, 5000))
    assert args.save_total_limit >= args.average_last


def test_settings_that_do_not_fit_are_refused(capsys):
    for wrong, message in (
        (["--student.num_frozen_layers=0"], "student.num_frozen_layers=0; freeze 1 or more"),
        (["--trainer.eval_strategy=epoch"], "needs data.dev_manifest"),
        (["--trainer.dataloader_num_workers=3"], "set data.num_workers alone"),
        (["--loss.objective=l1"], "loss.objective"),
        (["--loss.temperature=0"], "loss.temperature"),
        (["--data.max_batch_size=0"], "data.max_batch_size must be 1 or more, got 0"),
        (["--data.max_skipped_fraction=2"], "data.max_skipped_fraction must be 0 to 1, got 2"),
        (["--teacher.pooling=max"], "teacher.pooling"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parse_config(
                train.SegueConfig, ["--config", str(RECIPE / "barista.yaml"), "--trainer.use_cpu=true", *wrong]
            )
        assert stopped.value.code == 2 and message in capsys.readouterr().err


# whole runs


def arguments(path: Path, teacher: str, student: str, manifest: Path, *more: str) -> list[str]:
    is_whisper = "whisper" in path.read_text().split("student:")[1].split("loss:")[0]
    folder = manifest.parent
    options = {
        "teacher.name": teacher,
        "teacher.embeddings_dir": folder / "vectors",
        "student.name": student,
        "data.train_manifest": manifest,
        "data.test_manifest": manifest,
        "data.labels_dir": "null",
        "data.max_batch_seconds": 8,
        "data.num_workers": 0,
        "trainer.output_dir": folder / "run",
        "trainer.max_steps": 2,
        "trainer.save_strategy": "steps",
        "trainer.save_steps": 1,
        "trainer.logging_steps": 1,
        "trainer.learning_rate": 0.01,
        "trainer.warmup_steps": 0,
        "trainer.eval_strategy": "no",
        "trainer.average_last": 0,
        "trainer.save_total_limit": 2,
        "trainer.bf16": "false",
        "trainer.use_cpu": "true",
    }
    if is_whisper:
        options |= {"student.num_frozen_layers": 1, "student.lower_states_dir": folder / "states"}
    if "dev_manifest" in path.read_text():
        options["data.dev_manifest"] = manifest
    return ["--config", str(path), *(f"--{key}={value}" for key, value in options.items()), *more]


@pytest.fixture
def whisper_run(sentence_model: str, manifest: Path, tmp_path: Path) -> list[str]:
    """Arguments of a run whose student is a tiny Whisper with one of two layers frozen."""
    return arguments(RECIPE / "quickstart.yaml", sentence_model, str(save_tiny_whisper(tmp_path)), manifest)


@pytest.mark.recipe
@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_recipe_trains_two_steps(path, sentence_model, wav2vec2_folder, manifest, tmp_path):
    is_whisper = path.stem in ("barista", "fsdd", "quickstart")
    encoder = str(save_tiny_whisper(tmp_path)) if is_whisper else wav2vec2_folder
    argv = arguments(path, sentence_model, encoder, manifest)
    store_targets.main(argv)
    train.main(argv)
    before, after = load_file(Path(encoder) / "model.safetensors"), student_of(tmp_path / "run")
    moved = {name for name in after if name in before and not after[name].equal(before[name])}
    lower = ("encoder.layers.0.", "encoder.conv", "encoder.embed_positions")
    assert moved and not (is_whisper and any(name.startswith(lower) for name in moved))
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["steps"] == 2 and run["train_utterances"] == 6 and run["teacher_outputs"] == "stored"
    assert run["lower_states"] == ("stored" if is_whisper else "live") and run["loss"] == "mse"


@pytest.mark.recipe
def test_a_live_teacher_gives_the_student_of_stored_vectors_and_does_not_learn(
    sentence_model, wav2vec2_folder, manifest, tmp_path
):
    argv = arguments(RECIPE / "minds14.yaml", sentence_model, wav2vec2_folder, manifest)
    store_targets.main(argv)
    train.main(argv)
    live = [*argv, "--teacher.embeddings_dir=null", f"--trainer.output_dir={tmp_path / 'live'}"]
    config, _ = parse_config(train.SegueConfig, live)
    trainer, run = train.build_trainer(config)
    before = {name: weight.clone() for name, weight in trainer.teacher.state_dict().items()}
    trainer.train()
    assert run["teacher_outputs"] == "live" and not trainer.teacher.training
    assert all(weight.equal(before[name]) for name, weight in trainer.teacher.state_dict().items())
    assert all(weight.grad is None for weight in trainer.teacher.parameters())
    trained = trainer.model.encoder.state_dict()
    for name, weight in student_of(tmp_path / "run").items():
        torch.testing.assert_close(trained[name], weight, rtol=0, atol=1e-4)
    convolution = "feature_extractor.conv_layers.0.conv.weight"
    assert not trained[convolution].equal(load_file(Path(wav2vec2_folder) / "model.safetensors")[convolution])


@pytest.mark.recipe
def test_stored_lower_states_give_the_losses_of_live_layers(whisper_run, tmp_path):
    store_targets.main(whisper_run)
    losses = []
    for name, more in (("stored", []), ("live", ["--student.lower_states_dir=null"])):
        train.main([*whisper_run, *more, f"--trainer.output_dir={tmp_path / name}"])
        log = [json.loads(line) for line in (tmp_path / name / "train_log.jsonl").read_text().splitlines()]
        losses.append([row["loss/mse"] for row in log if "loss/mse" in row])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # the states are stored in float16
    assert len(losses[0]) == 2


@pytest.mark.recipe
def test_a_resumed_run_ends_with_the_same_student(whisper_run, tmp_path):
    store_targets.main(whisper_run)
    train.main(whisper_run)
    run = tmp_path / "run"
    first = student_of(run)
    forget_the_end(run, 2)
    train.main(whisper_run)
    assert all(student_of(run)[name].equal(weight) for name, weight in first.items())


@pytest.mark.recipe
def test_the_student_may_be_the_mean_of_its_last_checkpoints(whisper_run, tmp_path):
    store_targets.main(whisper_run)
    train.main([*whisper_run, "--trainer.average_last=2"])
    run = tmp_path / "run"
    one, two = (load_file(run / f"checkpoint-{step}/model.safetensors") for step in (1, 2))
    name = "encoder.layers.1.fc1.weight"
    assert not one[name].equal(two[name])
    torch.testing.assert_close(student_of(run)[name], (one[name] + two[name]) / 2)


@pytest.mark.recipe
def test_the_student_is_scored_and_loads_in_stock_transformers(whisper_run, sentence_model, tmp_path):
    store_targets.main(whisper_run)
    train.main(whisper_run)
    evaluate_embeddings.main(whisper_run)
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    scores = results["models"]["SEGUE"]
    assert results["models"].keys() == {"SEGUE"}
    assert "are 32 wide, the teacher's 16" in results["not_scored"]["untouched encoder"]
    assert scores["num_clips"] == 6 and scores["num_texts"] == 5 and scores["chance"] == 0.2
    assert results["command"].endswith(f"--config {run / 'config.yaml'}")
    assert {"device", "date", "wall_seconds"} <= results.keys() and results["wall_seconds"]["evaluate"] > 0
    table = json.loads((run / "retrieval.json").read_text())
    assert [row["encoder"] for row in table["measurements"]] == ["SEGUE"] and table["steps"] == 2
    card = (run / "student/README.md").read_text()
    assert "6 clips" in card and "5 different texts" in card and "weights SHA-256" in card

    embedder = SpeechEmbedder.from_pretrained(run / "student")
    waveforms = [soundfile.read(tmp_path / f"audio/{index}.wav", dtype="float32")[0] for index in range(6)]
    again = retrieval_scores(embedder.encode(waveforms), load_sentence_teacher(sentence_model)(TEXTS).numpy(), TEXTS)
    assert again == pytest.approx({name: scores[name] for name in again}, rel=1e-4)
    code = (
        "import sys, torch\n"
        "from transformers import AutoFeatureExtractor, AutoModel\n"
        "encoder = AutoModel.from_pretrained(sys.argv[1]).encoder\n"
        "features = AutoFeatureExtractor.from_pretrained(sys.argv[1])([0.0] * 16000, sampling_rate=16000)\n"
        "states = encoder(torch.tensor(features['input_features'][0])[None]).last_hidden_state\n"
        "assert states.shape == (1, 1500, 32), states.shape\n"
        "assert 'speechkd' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(run / "student")], check=True, cwd=tmp_path)


@pytest.mark.recipe
def test_an_encoder_of_the_teachers_width_is_also_scored_untouched(sentence_model, tiny_teacher, manifest, tmp_path):
    argv = arguments(
        RECIPE / "quickstart.yaml", sentence_model, tiny_teacher, manifest, "--teacher.embeddings_dir=null"
    )
    store_targets.main(argv)
    train.main(argv)
    evaluate_embeddings.main(argv)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["models"].keys() == {"SEGUE", "untouched encoder"} and results["not_scored"] == {}
    assert results["models"]["SEGUE"]["mse"] < results["models"]["untouched encoder"]["mse"]


@pytest.mark.recipe
def test_clips_that_cannot_be_read_are_skipped_up_to_the_limit(sentence_model, wav2vec2_folder, manifest, tmp_path):
    (tmp_path / "audio/3.wav").write_bytes(b"RIFF, but nothing more")
    argv = arguments(RECIPE / "minds14.yaml", sentence_model, wav2vec2_folder, manifest)
    argv = [*argv, "--data.dev_manifest=null", "--trainer.max_steps=1"]
    store_targets.main(argv)
    with pytest.raises(ValueError, match="1 of 6 clips .* were skipped"):
        train.main(argv)
    train.main([*argv, "--data.max_skipped_fraction=0.2", f"--trainer.output_dir={tmp_path / 'allowed'}"])
    assert json.loads((tmp_path / "allowed/run.json").read_text())["train_utterances"] == 5
    assert "clip-3" in (tmp_path / "allowed/skipped.jsonl").read_text()


@pytest.mark.recipe
def test_the_best_student_on_the_development_set_can_be_kept(whisper_run, manifest, tmp_path):
    more = [f"--data.dev_manifest={manifest}", "--trainer.eval_strategy=steps", "--trainer.eval_steps=1"]
    more += ["--trainer.load_best_model_at_end=true", "--trainer.learning_rate=10"]  # the second step can only be worse
    store_targets.main([*whisper_run, *more])
    train.main([*whisper_run, *more])
    log = [json.loads(line) for line in (tmp_path / "run/train_log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval_loss/mse"] for row in log if "eval_loss/mse" in row}
    best = min(losses, key=losses.get)
    kept = load_file(tmp_path / f"run/checkpoint-{best}/model.safetensors")
    assert len(losses) == 2
    assert student_of(tmp_path / "run")["encoder.layers.1.fc1.weight"].equal(kept["encoder.layers.1.fc1.weight"])


@pytest.mark.recipe
def test_doctor_checks_the_recipe_and_estimates_its_costs(whisper_run, manifest):
    store_targets.main(whisper_run)
    test_manifest = manifest.with_name("test.jsonl")
    test_manifest.write_text(manifest.read_text().replace('"clip-', '"test-'))
    found = check_config(RECIPE / "quickstart.yaml", [*whisper_run[2:], f"--data.test_manifest={test_manifest}"])
    assert found["problems"] == [] and found["config"]["class"] == "SegueConfig"
    assert found["estimates"]["total_steps"] == 2


def test_run_sh_says_what_would_do(tmp_path):
    done = run_sh("segue", tmp_path, "timit")
    assert done.returncode == 2 and "there are: barista fluent_speech_commands fsdd" in done.stderr
    done = run_sh("segue", tmp_path, "fsdd", "--stage", "7")
    assert done.returncode == 2 and "a stage is 1 to 6, not '7'" in done.stderr
    done = run_sh("segue", tmp_path, "fsdd", "--stop-stage")
    assert done.returncode == 2 and "--stop-stage needs a value" in done.stderr


@pytest.mark.recipe
def test_the_stages_end_with_a_scored_student(whisper_run, tmp_path):
    options = [*whisper_run[2:], "--understanding=null", "--stage", "2"]
    first = run_sh("segue", tmp_path, "quickstart", *options)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "the texts are those of the manifests" in first.stdout and "| SEGUE |" in first.stdout
    assert "no understanding section" in first.stdout
    wall = json.loads((tmp_path / "run/results.json").read_text())["wall_seconds"]
    assert wall.keys() == {"embed", "train", "evaluate"}


@pytest.mark.recipe
def test_every_split_is_transcribed_by_the_label_teacher(tmp_path):
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/speechkd"
    program.write_text('#!/bin/sh\necho "$@" >> "$0.log"\n')  # stands for the program that is called
    program.chmod(0o755)
    words = ["barista", "--stage", "2", "--stop-stage", "2", "--data.labels_dir=said", "--data.dev_manifest=dev.jsonl"]
    done = run_sh("segue", tmp_path, *words, "--data.label_teacher=openai/whisper-small", first_on_path=program.parent)
    assert done.returncode == 0, done.stderr
    calls = Path(f"{program}.log").read_text().splitlines()
    start = "label --teacher openai/whisper-small --whisper-task transcribe --batch-size 16 --max-new-tokens 96"
    assert len(calls) == 3 and all(call.startswith(start) for call in calls)
    assert [call.split("--max-skipped-fraction 0.01 ")[1] for call in calls] == [
        "--manifest data/barista/train.jsonl --output-dir said/train --language en",
        "--manifest data/barista/test.jsonl --output-dir said/test --language en",
        "--manifest dev.jsonl --output-dir said/dev --language en",
    ]
