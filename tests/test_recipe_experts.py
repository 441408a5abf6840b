"""recipes/whisper_experts on a tiny random teacher and generated audio: its objective, its adapters, its commands."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TOKENS, tiny_whisper
from recipe_runs import run_sh
from safetensors.torch import load_file
from transformers import WhisperForConditionalGeneration

sys.path.append(str(ROOT / "recipes/whisper_experts"))  # behind the others: its train.py is loaded by path

import evaluate_adapters
import tabulate_adapters
from gated_objective import LossConfig, collate_with_lengths, frame_mask, loss_terms, smoothing_term, term_weights

from speechkd.check_config import check_config
from speechkd.config import parse_config
from speechkd.data.audio import AudioError
from speechkd.data.features import WhisperLogMel
from speechkd.estimate import load_recipe
from speechkd.export.huggingface import export_short_window
from speechkd.labels.decoding import DecodingConfig
from speechkd.labels.pseudo_label import label_manifest
from speechkd.losses.logits import js
from speechkd.models.language_experts import add_experts, gate_totals, gated_blocks, load_experts, train_only

RECIPE = ROOT / "recipes/whisper_experts"
YAMLS = sorted(RECIPE.glob("*.yaml"))
train = load_recipe(RECIPE / "train.py")


def batch_of(num_samples: tuple[int, ...], texts: tuple[list[int], ...]) -> dict[str, Any]:
    torch.manual_seed(3)
    items = [
        {
            "id": str(index),
            "duration_seconds": count / 16_000,
            "token_ids": [*TOKENS.prefix, *text, TOKENS.end_of_text],
            "previous_ids": None,
            "epoch": 0,
            "waveform": torch.randint(-3000, 3000, (count,), dtype=torch.int16),
        }
        for index, (count, text) in enumerate(zip(num_samples, texts, strict=True))
    ]
    return collate_with_lengths(items, TOKENS, window_seconds=30.0)


def student_with_experts() -> WhisperForConditionalGeneration:
    student = tiny_whisper(decoder_layers=2)
    add_experts(student, ["en"])
    train_only(student, "en")
    return student


def test_the_terms_weigh_as_in_the_published_code():
    label_weight, kd_weight = term_weights(LossConfig(), with_teacher=True)
    assert label_weight * (2.0 + 0.0) + kd_weight * 0.4 == pytest.approx(0.702993, abs=1e-6)
    assert term_weights(LossConfig(), with_teacher=False) == (1.0, 0.0)


def test_smoothed_cross_entropy_needs_no_logits():
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 4, 8, requires_grad=True), torch.randn(11, 8)
    labels = torch.tensor([[3, 0, -100, -100], [10, 5, 5, -100]])
    logits = hidden @ head.T
    smoothed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1, reduction="sum")
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    ours = plain + 0.1 * smoothing_term(hidden, head, labels)
    torch.testing.assert_close(ours, smoothed)
    (gradient,), (expected,) = (torch.autograd.grad(loss, hidden, retain_graph=True) for loss in (ours, smoothed))
    torch.testing.assert_close(gradient, expected)


def test_the_objective_is_that_of_plain_logits():
    student, teacher = student_with_experts().eval(), tiny_whisper(decoder_layers=3)
    batch = batch_of((16_000, 40_000), ([400, 401], [402, 403, 404, 405]))
    log_mel = WhisperLogMel(80)
    total, terms = loss_terms(student, teacher, batch, weights=LossConfig(gate_budget=0.25), log_mel=log_mel)
    inputs = {"input_features": log_mel(batch["waveforms"] / 32_768), "decoder_input_ids": batch["decoder_input_ids"]}
    logits, teacher_logits = student(**inputs).logits, teacher(**inputs).logits
    labels = batch["labels"]
    mask = labels >= 0
    cross_entropy = F.cross_entropy(logits[mask], labels[mask], label_smoothing=0.1, reduction="sum")
    divergence = js(logits, teacher_logits, mask, reduction="sum")
    gate = 0.75 * mask.sum()  # new gates are all open
    torch.testing.assert_close(terms["cross_entropy"], cross_entropy.detach())
    torch.testing.assert_close(terms["js"], divergence.detach())
    torch.testing.assert_close(terms["gate"], gate)
    torch.testing.assert_close(total, 0.5 * ((cross_entropy + gate) / 1.41**2 + divergence))


def test_padding_a_batch_changes_neither_loss_nor_gates():
    student = student_with_experts().eval()
    for block in gated_blocks(student):
        for weight in block.experts["en"].parameters():
            weight.data += 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    arguments = {"weights": LossConfig(), "log_mel": WhisperLogMel(80)}
    batch = batch_of((16_000, 48_000), ([400, 401], [402, 403, 404, 405]))
    both, _ = loss_terms(student, None, batch, **arguments)
    assert batch["num_samples"].tolist() == [16_000, 48_000]
    assert frame_mask(batch["num_samples"], 1500).sum(dim=1).tolist() == [50, 150]
    with torch.no_grad():
        sums, counts = gate_totals(student, frame_mask(batch["num_samples"], 1500), batch["labels"] >= 0)
    assert counts.tolist() == [200, 200, 6 + 2 * 4, 6 + 2 * 4]  # prefix labels and the end count too
    padded = {**batch, "labels": F.pad(batch["labels"], (0, 3), value=-100)}
    padded["decoder_input_ids"] = F.pad(batch["decoder_input_ids"], (0, 3), value=TOKENS.end_of_text)
    longer, _ = loss_terms(student, None, padded, **arguments)
    torch.testing.assert_close(longer, both)


def test_loss_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="loss.gate_budget must be 0 to 1, got 1.5"):
        LossConfig(gate_budget=1.5)
    with pytest.raises(ValueError, match="loss.label_sigma must be positive, got 0"):
        LossConfig(label_sigma=0)


def arguments(path: Path, model: str, manifest: Path, adapter: str, *more: str) -> list[str]:
    options = {
        "student.init_from": model,
        "student.adapter": adapter,
        "data.train_manifest": manifest,
        "data.test_manifest": manifest,
        "data.max_batch_seconds": 60,
        "data.num_workers": 0,
        "decoding.max_new_tokens": 6,
        "decoding.num_workers": 0,
        "decoding.language": "en",
        "trainer.output_dir": manifest.parent / f"run-{adapter}",
        "trainer.max_steps": 2,
        "trainer.save_strategy": "steps",
        "trainer.save_steps": 1,
        "trainer.logging_steps": 1,
        "trainer.learning_rate": 0.01,
        "trainer.warmup_steps": 0,
        "trainer.gradient_accumulation_steps": 1,
        "trainer.use_cpu": "true",
    }
    return ["--config", str(path), *(f"--{key}={value}" for key, value in options.items()), *more]


def train_and_resume(argv: list[str], run: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights after the first and the second step; the second is also made by a resumed run, with the same result."""
    train.main(argv)
    before, after = (load_file(run / f"checkpoint-{step}/model.safetensors") for step in (1, 2))
    shutil.rmtree(run / "checkpoint-2")
    (run / "run.json").unlink()
    train.main(argv)
    resumed = load_file(run / "checkpoint-2/model.safetensors")
    assert resumed.keys() == after.keys() and all(resumed[name].equal(weight) for name, weight in after.items())
    return before, after


@pytest.mark.recipe
def test_experts_train_resume_save_load_and_merge(tiny_teacher, tone_manifest):
    argv = arguments(RECIPE / "fsdd.yaml", tiny_teacher, tone_manifest, "experts")
    run = tone_manifest.parent / "run-experts"
    before, after = train_and_resume(argv, run)
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and all(".experts.en." in name for name in moved)
    assert '"loss/gate_mean"' in (run / "train_log.jsonl").read_text()

    trained = WhisperForConditionalGeneration.from_pretrained(tiny_teacher)
    load_experts(trained, run / "experts", ["en"])
    saved = {name: weight for name, weight in trained.state_dict().items() if ".experts." in name}
    assert saved and all(after[name].equal(weight) for name, weight in saved.items())

    shares = json.loads((run / "gates.json").read_text())["open_shares"]
    assert [len(shares[half]) for half in ("encoder", "decoder")] == [2, 3]
    merged = WhisperForConditionalGeneration.from_pretrained(run / "student").state_dict()
    base = WhisperForConditionalGeneration.from_pretrained(tiny_teacher).state_dict()
    assert merged.keys() == base.keys()
    for half in ("encoder", "decoder"):
        for layer, share in enumerate(shares[half]):
            place = f"model.{half}.layers.{layer}.fc1"
            chosen = ".experts.en.feed_forward.fc1.weight" if share >= 0.5 else ".shared.fc1.weight"
            assert merged[f"{place}.weight"].equal(after[f"{place}{chosen}"])

    evaluate_adapters.main(argv)
    results = json.loads((run / "results.json").read_text())
    assert results["models"].keys() == {"base", "merged", "gated"} and results["parity"]["num_utterances"] == 6
    assert "| experts, gated (exact) |" in tabulate_adapters.format_table([run])


@pytest.mark.recipe
def test_merged_lora_is_the_trained_model(tiny_teacher, tone_manifest):
    peft = pytest.importorskip("peft")
    argv = arguments(RECIPE / "fsdd.yaml", tiny_teacher, tone_manifest, "lora")
    run = tone_manifest.parent / "run-lora"
    before, after = train_and_resume(argv, run)
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and all(".lora_" in name for name in moved)
    base = WhisperForConditionalGeneration.from_pretrained(tiny_teacher)
    adapted = peft.PeftModel.from_pretrained(base, run / "lora").eval()
    merged = WhisperForConditionalGeneration.from_pretrained(run / "student").eval()
    torch.manual_seed(0)
    inputs = {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": torch.tensor([list(TOKENS.prefix)])}
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, adapted(**inputs).logits, atol=1e-5, rtol=1e-4)
        start = WhisperForConditionalGeneration.from_pretrained(tiny_teacher).eval()(**inputs).logits
        assert not torch.allclose(merged(**inputs).logits, start, atol=1e-3)
    assert json.loads((run / "run.json").read_text())["adapter"] == "lora"


@pytest.mark.recipe
def test_a_teacher_adds_its_term_and_wrong_labels_are_refused(tiny_teacher, tone_manifest):
    labels = tone_manifest.parent / "labels"
    label_manifest(tiny_teacher, tone_manifest, labels / "train", decoding=DecodingConfig(max_new_tokens=6))
    more = [f"--teacher.name={tiny_teacher}", f"--data.labels_dir={labels}", "--trainer.max_steps=1"]
    more += [f"--filters.{name}=null" for name in ("max_wer", "min_mean_logprob", "max_compression_ratio")]
    more += ["--filters.max_repeated_5grams=null", "--filters.drop_unfinished=false"]
    train.main(arguments(RECIPE / "barista.yaml", tiny_teacher, tone_manifest, "none", *more))
    run = tone_manifest.parent / "run-none"
    first = json.loads((run / "train_log.jsonl").read_text().splitlines()[0])
    assert first["loss/js"] == pytest.approx(0.0, abs=1e-5)  # the student is its teacher still
    assert first["loss/total"] == pytest.approx(0.5 / 1.41**2 * first["loss/cross_entropy"], rel=1e-4)
    with pytest.raises(ValueError, match="6 of 6 labels .* are not of decoding.language=ca"):
        other = [*more, "--decoding.language=ca", f"--trainer.output_dir={tone_manifest.parent / 'other'}"]
        train.main(arguments(RECIPE / "barista.yaml", tiny_teacher, tone_manifest, "none", *other))


@pytest.mark.recipe
def test_a_short_window_counts_in_batches_and_bounds_the_clips(tiny_teacher, tone_manifest, tmp_path):
    for seconds in (1, 2):
        export_short_window(Path(tiny_teacher), tmp_path / f"{seconds}s", seconds)
    argv = arguments(RECIPE / "fsdd.yaml", str(tmp_path / "2s"), tone_manifest, "lora", "--data.max_batch_seconds=4")
    trainer, *_ = train.build_trainer(parse_config(train.ExpertsConfig, argv)[0])
    batches = list(trainer.get_train_dataloader())
    assert [len(batch["ids"]) for batch in batches] == [2, 2, 2]
    assert all(batch["padded_seconds"] == 4 for batch in batches)
    one = arguments(RECIPE / "fsdd.yaml", str(tmp_path / "1s"), tone_manifest, "lora")
    with pytest.raises(AudioError, match="5 of 6"):
        train.main([*one, f"--trainer.output_dir={tmp_path / 'one'}"])
    other = [f"--teacher.name={tiny_teacher}", f"--trainer.output_dir={tmp_path / 'other'}"]
    with pytest.raises(ValueError, match="has 1500 encoder positions and student.init_from=.*2s 100, but both hear"):
        train.main([*argv, *other])


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_is_a_configuration(path):
    config, _ = parse_config(train.ExpertsConfig, ["--config", str(path), "--trainer.use_cpu=true"])
    assert config.student.adapter == "experts" and config.trainer.output_dir.startswith("exp/whisper_experts/")


@pytest.mark.recipe
def test_doctor_checks_the_recipe_and_estimates_its_costs(tiny_teacher, tone_manifest):
    test_manifest = tone_manifest.with_name("test.jsonl")
    test_manifest.write_text(tone_manifest.read_text().replace('"tone-', '"test-'))
    argv = arguments(RECIPE / "fsdd.yaml", tiny_teacher, tone_manifest, "experts")
    found = check_config(RECIPE / "fsdd.yaml", [*argv[2:], f"--data.test_manifest={test_manifest}"])
    assert found["problems"] == [] and found["config"]["class"] == "ExpertsConfig"
    assert found["estimates"]["total_steps"] == 2


def test_settings_that_do_not_fit_are_refused(tiny_teacher, tone_manifest, capsys):
    cached = '--teacher={"name": "bundled:whisper-base", "cache_encoder_states": true}'
    stored = '--teacher={"name": "bundled:whisper-base", "stored_outputs": "decoder_states"}'
    for wrong, message in (
        ("--decoding.language=null", "student.adapter=experts needs decoding.language"),
        ("--student.adapter=adapters", "student.adapter"),
        (cached, "the student's encoder is trained"),
        (stored, "teacher.stored_outputs do not fit"),
        ("--data.pack=true", "data.pack=True is not for this recipe"),
        ("--data.timestamp_probability=0.5", "data.timestamp_probability=0.5 is not for this recipe"),
        ("--trainer.eval_strategy=epoch", "needs data.dev_manifest"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parse_config(
                train.ExpertsConfig, arguments(RECIPE / "fsdd.yaml", tiny_teacher, tone_manifest, "experts", wrong)
            )
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_lora_without_peft_says_which_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r'pip install "speechkd\[lora\]"'):
        train.adapt(tiny_whisper(), "lora", "en")


def test_run_sh_says_what_would_do(tmp_path):
    done = run_sh("whisper_experts", tmp_path, "timit")
    assert done.returncode == 2 and "there are: barista common_voice fsdd" in done.stderr
    done = run_sh("whisper_experts", tmp_path, "fsdd", "--stage", "4")
    assert done.returncode == 2 and "a stage is 1 to 3, not '4'" in done.stderr
    done = run_sh("whisper_experts", tmp_path, "fsdd", "--student.adapter", "lora")
    assert done.returncode == 2 and '--adapters "experts lora none" chooses' in done.stderr
