import pytest
import yaml
from conftest import tiny_whisper
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from speechkd.export.huggingface import model_card, read_run, save_student, update_card

RUN = {
    "title": "distil-whisper test",
    "teacher": {"name": "openai/whisper-base", "revision": None, "weights_sha256": "ab" * 32},
    "license": "mit",
    "language": "en",
    "encoder_layers": 2,
    "decoder_layers": 2,
    "decoder_layers_kept": [0, 5],
    "parameters": 55_780_000,
    "train_manifest": "data/synthetic_commands/train.jsonl",
    "train_utterances": 10,
    "train_hours": 0.5,
    "labels": "greedy transcripts of the teacher",
    "synthetic": True,
    "loss": "0.8 CE + 1 KL(teacher, T=2, T^2)",
    "steps": 3,
    "learning_rate": 1e-4,
    "seed": 1,
    "device": "a processor",
    "date": "2026-11-24",
    "speechkd_version": "0.1.0",
}
SCORES = {"wer": 12.345, "cer": 3.0, "rtfx": 2.0, "num_utterances": 7, "manifest": "m", "reference": "r"}
SCORES |= {"normalizer": "english"}


def test_the_card_names_teacher_data_loss_licence_and_scores():
    card = model_card(RUN, {"student after": SCORES})
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "openai/whisper-base" and header["license"] == "mit"
    for part in ("ab" * 32, "10 utterances", "0.8 CE + 1 KL", "| student after | 12.35 | 3.00 | 2.00 |", "synthetic"):
        assert part in card


@pytest.mark.parametrize("name", ["bundled:whisper-base", "some/local/folder", "folder"])
def test_only_a_hub_id_is_named_as_base_model(name):
    assert "base_model" not in model_card({**RUN, "teacher": {**RUN["teacher"], "name": name}})


def test_a_saved_student_loads_and_replaces_an_earlier_one(tmp_path, tiny_teacher):
    processor = WhisperProcessor.from_pretrained(tiny_teacher)
    (tmp_path / "student").mkdir()
    (tmp_path / "student/stale").touch()
    save_student(tiny_whisper(2), processor, tmp_path / "student", model_card(RUN))
    assert not (tmp_path / "student/stale").exists()
    assert WhisperForConditionalGeneration.from_pretrained(tmp_path / "student").config.decoder_layers == 2
    update_card(tmp_path / "student", RUN, {"student after": SCORES})
    assert "12.35" in (tmp_path / "student/README.md").read_text()


def test_an_unfinished_training_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no finished training .*run the train stage first"):
        read_run(tmp_path)
