import copy

import pytest
import refresh_draft
import torch
from safetensors.torch import load_file
from transformers import WhisperForConditionalGeneration

from speechkd.data.collate import WhisperTokens
from speechkd.files import read_jsonl, write_jsonl
from speechkd.labels.pseudo_label import DecodingConfig, label_manifest
from speechkd.labels.teacher_cache import LabelStore
from speechkd.models.draft_refresh import RefreshConfig, RefreshedDraft
from speechkd.models.speculative import load_assistant, speculative_decode
from speechkd.models.whisper import greedy_decode, student_from_teacher
from speechkd.teachers import load_processor, load_whisper

CONFIG = RefreshConfig(refresh_every=2, num_steps=15, batch_size=2, buffer_clips=2, learning_rate=0.02)


@pytest.fixture(scope="module")
def teacher(tiny_teacher) -> WhisperForConditionalGeneration:
    """With larger weights, so that its greedy text is no repetition of one token."""
    model = load_whisper(tiny_teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight.normal_()
        model.model.decoder.embed_positions.weight.normal_(std=3)
        for weight in model.model.decoder.layers.parameters():
            weight.normal_(std=0.4)
    return model


@pytest.fixture(scope="module")
def student_folder(teacher, tmp_path_factory) -> str:
    """Its decoder layer is random, so nearly all of its drafts are rejected."""
    folder = tmp_path_factory.mktemp("student")
    student = student_from_teacher(teacher, decoder_layers=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in student.model.decoder.layers.parameters():
            weight.normal_(std=0.4)
    student.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokens(tiny_teacher) -> WhisperTokens:
    return WhisperTokens.from_tokenizer(load_processor(tiny_teacher).tokenizer)


def clips(number: int) -> list[torch.Tensor]:
    """Two kinds of clips in turns, as a stream that repeats itself."""
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    kinds = [torch.randn(1, 1500, 16, generator=generator) for generator in generators]
    return [kinds[index % 2] for index in range(number)]


def test_the_text_stays_the_teachers_while_more_and_more_drafts_are_accepted(teacher, student_folder, tokens):
    draft = RefreshedDraft(teacher, student_folder, tokens, CONFIG, max_new_tokens=12)
    accepted = []
    for states in clips(12):
        expected = greedy_decode(teacher, states, tokens, max_new_tokens=12)[0]
        result = draft.decode(states)
        assert result.token_ids == expected.token_ids and result.finished == expected.finished
        accepted.append(result.num_accepted)
    assert draft.num_refreshes == 6 and len(draft.lessons) <= CONFIG.buffer_clips
    assert sum(accepted[-4:]) >= sum(accepted[:4]) + 8, accepted


def test_a_refresh_lowers_the_loss_on_the_rejected_positions_and_leaves_teacher_and_encoder_alone(
    teacher, student_folder, tokens
):
    before = copy.deepcopy(teacher.state_dict())
    draft = RefreshedDraft(
        teacher, student_folder, tokens, RefreshConfig(num_steps=6, learning_rate=0.01), max_new_tokens=12
    )
    assert draft.refresh() == []  # nothing was rejected yet
    for states in clips(2):
        draft.decode(states)
    losses = draft.refresh()
    assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert draft.student.model.encoder is teacher.model.encoder


def test_the_teachers_distribution_is_kept_where_it_chose_otherwise_than_the_draft(teacher, student_folder, tokens):
    (states,) = clips(1)
    rejected = {}
    assistant = load_assistant(student_folder, teacher)
    result = speculative_decode(
        teacher,
        assistant,
        states,
        tokens,
        max_new_tokens=12,
        on_rejection=lambda at, logits: rejected.update({at: logits}),
    )
    assert len(rejected) == result.num_steps - (result.num_accepted == result.num_drafted)
    with torch.no_grad():
        logits = teacher(encoder_outputs=(states,), decoder_input_ids=torch.tensor([result.token_ids])).logits[0]
    for at, kept in rejected.items():
        assert kept.argmax() == result.token_ids[at]
        allowed = kept.isfinite()
        torch.testing.assert_close(kept[allowed], logits[at - 1][allowed], rtol=1e-4, atol=1e-4)

    draft = RefreshedDraft(teacher, student_folder, tokens, RefreshConfig(refresh_every=0, top_k=4), max_new_tokens=12)
    draft.decode(states)
    (lesson,) = draft.lessons
    assert lesson.positions == list(rejected) and draft.num_refreshes == 0
    assert lesson.targets.ids[:, 0].tolist() == [result.token_ids[at] for at in rejected]


def test_the_refreshed_student_is_a_stock_folder_with_the_same_encoder_and_the_assistants_decoder(
    teacher, student_folder, tiny_teacher, tokens, tmp_path
):
    draft = RefreshedDraft(teacher, student_folder, tokens, CONFIG, max_new_tokens=12)
    for states in clips(2):
        draft.decode(states)
    draft.save(tmp_path / "student", load_processor(tiny_teacher))
    old, new = load_file(f"{student_folder}/model.safetensors"), load_file(tmp_path / "student/model.safetensors")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert "model.decoder.layers.0.fc1.weight" in changed and not [name for name in changed if "encoder." in name[:14]]
    reloaded = load_assistant(str(tmp_path / "student"), teacher)  # compares every encoder weight
    for states in clips(2):
        again = speculative_decode(teacher, reloaded, states, tokens, max_new_tokens=12)
        assert again == speculative_decode(teacher, draft.assistant, states, tokens, max_new_tokens=12)


def test_the_script_transcribes_a_manifest_reports_acceptance_and_resumes(
    tiny_teacher, tone_manifest, tmp_path, capsys
):
    student = student_from_teacher(load_whisper(tiny_teacher), decoder_layers=1)
    student.save_pretrained(tmp_path / "draft")
    (tmp_path / "audio/3.wav").write_bytes(b"no audio")
    arguments = ["--teacher", tiny_teacher, "--assistant", str(tmp_path / "draft"), "--manifest", str(tone_manifest)]
    arguments += [
        "--output-dir",
        str(tmp_path / "out"),
        "--refresh-every",
        "2",
        "--num-steps",
        "1",
        "--max-new-tokens",
        "6",
    ]
    refresh_draft.main(arguments)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["first third", "last third", "all"]
    rows = read_jsonl(tmp_path / "out/transcripts.jsonl")
    assert [row["id"] for row in rows] == ["tone-0", "tone-1", "tone-2", "tone-4", "tone-5"]
    assert [row["id"] for row in read_jsonl(tmp_path / "out/skipped.jsonl")] == ["tone-3"]
    label_manifest(
        tiny_teacher,
        tone_manifest,
        tmp_path / "labels",
        decoding=DecodingConfig(max_new_tokens=6),
        max_skipped_fraction=0.5,
    )
    expected = {row["id"]: row["text"] for row in LabelStore(tmp_path / "labels").rows()}
    assert {row["id"]: row["text"] for row in rows} == expected

    write_jsonl(tmp_path / "out/transcripts.jsonl", rows[:4])  # as if it had been killed before the last clip
    refresh_draft.main(arguments)
    again = read_jsonl(tmp_path / "out/transcripts.jsonl")
    assert again[:4] == rows[:4] and again[4]["text"] == rows[4]["text"]


def test_settings_that_cannot_train_are_refused():
    with pytest.raises(ValueError, match="positive settings, got {'num_steps': 0}"):
        RefreshConfig(num_steps=0)
    with pytest.raises(ValueError, match="refresh_every must be 0"):
        RefreshConfig(refresh_every=-1)
