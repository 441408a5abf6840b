import json

import pytest
import torch

from speechkd.cli import main
from speechkd.data.manifest import write_manifest
from speechkd.files import write_jsonl
from speechkd.labels.teacher_cache import LabelStoreError, create_store
from speechkd.labels.verify import merge_stores, verify_store

TEACHER = {"name": "whisper-a", "revision": None, "weights_sha256": "a" * 64}
HEADER = {"teacher": TEACHER, "targets": ["text"], "decoding": {"language": "en", "dtype": "float32"}}
WITH_STATES = {
    **HEADER,
    "targets": ["encoder_states", "text"],
    "encoder_states": {"layer": "last", "dtype": "float16", "shape": [4, 2], "bytes_per_frame": 4},
}


def label_row(index: int, text: str = "a tone", **changes) -> dict:
    """A row for utterance `tone-<index>` of the manifest of conftest."""
    row = {
        "id": f"tone-{index}",
        "duration_seconds": 1.0 + 0.2 * index,
        "text": text,
        "token_ids": [50258, 400 + index],
    }
    return row | {"no_speech_prob": 0.1, "finished": True, "compute_seconds": 0.5} | changes


def states(*indices: int) -> dict[str, torch.Tensor]:
    return {f"tone-{index}": torch.full((4, 2), float(index), dtype=torch.float16) for index in indices}


def test_a_complete_store_has_no_problems_and_its_silent_clips_are_counted(tone_manifest, tmp_path):
    store = create_store(tmp_path / "labels", WITH_STATES)
    store.write_shard([label_row(0), label_row(1, "", no_speech_prob=0.9), label_row(2, " ")], states(0, 1, 2))
    store.write_shard([label_row(3), label_row(4, finished=False)], states(3, 4))
    write_jsonl(store.folder / "skipped.jsonl", [{"id": "tone-5", "audio": "audio/5.wav", "reason": "broken"}])
    report = verify_store(store.folder, tone_manifest)
    assert report["problems"] == [] and (report["num_rows"], report["num_skipped"]) == (5, 1)
    assert (report["num_empty"], report["num_unfinished"], report["num_probably_silent"]) == (2, 1, 1)
    main(["label", "--verify", "--output-dir", str(store.folder), "--manifest", str(tone_manifest)])


def test_every_kind_of_damage_is_named(tone_manifest, tmp_path, capsys):
    store = create_store(tmp_path / "labels", WITH_STATES)
    store.write_shard([label_row(0), label_row(1)], states(0))  # no array of tone-1
    nan = torch.full((4, 2), torch.nan, dtype=torch.float16)
    store.write_shard([label_row(0), label_row(2)], states(0) | {"tone-2": nan})
    store.write_shard([label_row(3, duration_seconds=9.0), label_row(8)], states(3, 8))
    store.write_shard([label_row(3, duration_seconds=9.0), label_row(8)], states(3, 8))
    rows = (store.folder / "shard-00001.jsonl").read_text()
    (store.folder / "shard-00001.jsonl").write_text(rows + '{"id": "tone-4"\n')
    with pytest.raises(SystemExit) as exited:
        main(["label", "--verify", "--json", "--output-dir", str(store.folder), "--manifest", str(tone_manifest)])
    assert exited.value.code == 2
    problems = json.loads(capsys.readouterr().out)["problems"]
    for expected in (
        "shard-00001.jsonl:3: no row of a label store",
        "shard-00003.jsonl has the same ids as shard-00002.jsonl",
        "2 utterance(s) have arrays that are missing, damaged or of another shape: 'tone-1', 'tone-2'",
        "1 utterance(s) have more than one row; remove all but one of each: 'tone-0'",
        f"2 utterance(s) of {tone_manifest} have no row; run the same `speechkd label` again: 'tone-4', 'tone-5'",
        f"1 utterance(s) have rows, but are not in {tone_manifest}; it may be of another corpus or split: 'tone-8'",
        "1 utterance(s) last longer or shorter in the manifest; the labels belong to other audio: 'tone-3'",
    ):
        assert sum(expected in problem for problem in problems) == 1, (expected, problems)
    assert len(problems) == 7


def test_packs_are_checked_by_their_clips_and_the_packs_before_them(tone_manifest, tmp_path):
    store = create_store(tmp_path / "labels", HEADER)
    for first, previous in ((0, None), (2, "tone-0+1"), (4, "gone")):
        parts = [label_row(index) | {"start_seconds": 0.0} for index in (first, first + 1)]
        parts = parts[: 1 if first == 4 else 2]
        store.write_shard(
            [label_row(first, id=f"tone-{first}+1", duration_seconds=2.0, parts=parts, previous_id=previous)], {}
        )
    problems = verify_store(store.folder, tone_manifest)["problems"]
    assert [problem.split(";")[0] for problem in problems] == [
        "1 utterance(s) follow a pack that has no row, and can have no previous-text prompt: 'tone-4+1'",
        f"1 utterance(s) of {tone_manifest} have no row",
    ]


def test_the_teacher_is_compared_and_both_are_named(tiny_teacher, tmp_path):
    store = create_store(tmp_path / "labels", HEADER)
    store.write_shard([label_row(0)], {})
    (problem,) = verify_store(store.folder, teacher_name=tiny_teacher)["problems"]
    assert "teacher whisper-a (weights aaaaaaaaaaaa)" in problem and tiny_teacher in problem
    with pytest.raises(LabelStoreError, match="holds no label store"):
        verify_store(tmp_path)


def test_parts_of_a_corpus_become_one_store_with_every_id_once(tone_manifest, tmp_path):
    for name, indices in (("a", (0, 1, 2)), ("b", (2, 3)), ("c", (4,))):
        store = create_store(tmp_path / name, WITH_STATES)
        store.write_shard([label_row(index) for index in indices], states(*indices))
    write_jsonl(
        tmp_path / "b/skipped.jsonl", [{"id": key, "audio": None, "reason": "-"} for key in ("tone-5", "tone-4")]
    )
    folders = [str(tmp_path / name) for name in "abc"]
    main(["label", "--merge", *folders, "--output-dir", str(tmp_path / "merged")])
    merged = merge_stores(folders, tmp_path / "merged")  # again: nothing is added
    assert [row["id"] for row in merged.rows()] == [f"tone-{index}" for index in range(5)]
    assert all(torch.equal(merged.array(key), array) for key, array in states(0, 1, 2, 3, 4).items())
    report = verify_store(merged.folder, tone_manifest)
    assert report["problems"] == [] and report["num_skipped"] == 1


def test_a_merge_that_was_killed_goes_on(tmp_path):
    for name, index in (("a", 0), ("b", 1)):
        create_store(tmp_path / name, HEADER).write_shard([label_row(index)], {})
    create_store(tmp_path / "merged", HEADER).write_shard([label_row(0)], {})
    merged = merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert [row["id"] for row in merged.rows()] == ["tone-0", "tone-1"]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        (
            HEADER | {"teacher": TEACHER | {"name": "whisper-b", "weights_sha256": "b" * 64}},
            [label_row(1)],
            r"come from teacher whisper-a .*, but this run has whisper-b",
        ),
        (HEADER | {"targets": ["text", "codes"]}, [label_row(1)], r"targets is \['text'\] in .*a and .* in .*b"),
        (
            HEADER,
            [label_row(1), label_row(0, token_ids=[1])],
            r"1 utterance\(s\) have different labels .*'tone-0' \(in",
        ),
    ],
)
def test_stores_that_do_not_belong_together_are_refused_and_nothing_is_written(tmp_path, header, rows, message):
    create_store(tmp_path / "a", HEADER).write_shard([label_row(0)], {})
    create_store(tmp_path / "b", header).write_shard(rows, {})
    with pytest.raises(LabelStoreError, match=message):
        merge_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_store_listed_twice_or_too_few_are_refused(tmp_path):
    create_store(tmp_path / "a", HEADER)
    for stores in (["a"], ["a", "b/../a"], ["a", "merged"]):
        (tmp_path / "b").mkdir(exist_ok=True)
        with pytest.raises(LabelStoreError, match="two or more different stores and another output folder, got"):
            merge_stores([tmp_path / name for name in stores], tmp_path / "merged")


def test_a_shard_removed_by_hand_does_not_lead_to_another_being_overwritten(tmp_path):
    store = create_store(tmp_path / "labels", HEADER)
    for index in range(3):
        store.write_shard([label_row(index)], {})
    (store.folder / "shard-00001.jsonl").unlink()
    store.write_shard([label_row(1)], {})
    assert [row["id"] for row in store.rows()] == ["tone-0", "tone-2", "tone-1"]


def test_labelling_says_what_it_lacks(tmp_path, capsys):
    write_manifest(tmp_path / "m.jsonl", [])
    with pytest.raises(SystemExit) as exited:
        main(["label", "--output-dir", str(tmp_path / "labels")])
    assert exited.value.code == 2 and "labelling needs --teacher and --manifest" in capsys.readouterr().err
