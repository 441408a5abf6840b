"""From labels over scores to a student that was trained on the labels that passed."""

import json

import pytest
import train
import yaml
from conftest import ROOT
from test_labels_scores import tiny_language_model, word_tokenizer

from speechkd.labels.decoding import DecodingConfig
from speechkd.labels.pseudo_label import label_manifest
from speechkd.labels.score_labels import score_labels
from speechkd.labels.score_store import read_scores
from speechkd.labels.teacher_cache import LabelStore

pytestmark = pytest.mark.recipe


@pytest.fixture
def scored(tiny_teacher, tone_manifest, tmp_path):
    """Labels of six tones with scores of a tiny language model; options of a run on them."""
    label_manifest(
        tiny_teacher,
        tone_manifest,
        tmp_path / "labels/train",
        decoding=DecodingConfig(max_new_tokens=6),
        targets=("text", "encoder_states", "decoder_states"),
    )
    tiny_language_model().save_pretrained(tmp_path / "language-model")
    word_tokenizer(bos_token="<s>", unk_token="<unk>").save_pretrained(tmp_path / "language-model")
    score_labels(
        tmp_path / "labels/train",
        tone_manifest,
        tmp_path / "scores",
        ["lm_nll", "confidence"],
        language_model=str(tmp_path / "language-model"),
    )
    return {
        "teacher.name": tiny_teacher,
        "data.train_manifest": tone_manifest,
        "data.test_manifest": tone_manifest,
        "data.labels_dir": tmp_path / "labels",
        "data.max_batch_seconds": 60,
        "trainer.output_dir": tmp_path / "run",
        "trainer.max_steps": 2,
        "trainer.use_cpu": "true",
    }


def filter_report(options, config):
    train.main(["--config", str(config), *(f"--{key}={value}" for key, value in options.items())])
    run = json.loads((options["trainer.output_dir"] / "run.json").read_text())
    assert run["train_utterances"] == run["filters"]["kept"]["kept_utterances"]
    return run["filters"]


OFF = {"min_mean_logprob": None, "max_compression_ratio": None, "max_repeated_5grams": None, "drop_unfinished": False}


def test_a_recipe_trains_on_the_share_of_labels_with_the_best_stored_score(scored, tmp_path):
    options = {f"filters.{name}": json.dumps(value) for name, value in OFF.items()}
    options |= {
        "filters.scores_file": tmp_path / "scores/scores.jsonl",
        "filters.scores": json.dumps([{"name": "lm_nll", "keep_fraction": 0.5}]),
    }
    report = filter_report({**scored, **options}, ROOT / "recipes/distil_whisper/barista.yaml")
    assert report["kept"]["kept_utterances"] == 3 and report["dropped"] == {"lm_nll": 3}


def test_scores_stand_in_the_yaml_and_are_combined(scored, tmp_path):
    path = tmp_path / "scores/scores.jsonl"
    rows = read_scores(path, list(LabelStore(tmp_path / "labels/train").rows()))
    nll, confidence = (sorted(row[name] for row in rows) for name in ("lm_nll", "confidence"))
    config = yaml.safe_load((ROOT / "recipes/distil_whisper/barista.yaml").read_text())
    config["filters"] = {
        **OFF,
        "scores_file": str(path),
        "scores": [
            {"name": "lm_nll", "threshold": nll[3]},
            {"name": "confidence", "threshold": confidence[2]},
        ],
        "combine_scores": "or",
    }
    (tmp_path / "filtered.yaml").write_text(yaml.safe_dump(config))
    expected = sum(row["lm_nll"] <= nll[3] or row["confidence"] >= confidence[2] for row in rows)
    assert filter_report(scored, tmp_path / "filtered.yaml")["kept"]["kept_utterances"] == expected
