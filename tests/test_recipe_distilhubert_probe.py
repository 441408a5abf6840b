"""recipes/distilhubert/probe.py on tiny random encoders and generated digits and orders: scores, resuming, tables."""

import json
import shutil
import sys

import pytest
import torch
from conftest import ROOT, write_tone
from test_features_store import save_hubert, save_whisper

sys.path.append(str(ROOT / "recipes/distilhubert"))  # behind the others: its train.py is loaded by path

import probe
import tabulate_probes
from probe_tasks import ERRORS, SCORES, MiniProtocol, make_tasks, read_corpora
from tabulate_probes import format_table, retained

from speechkd.data.audio import AudioError
from speechkd.data.manifest import write_manifest
from speechkd.models.speech_encoders import load_encoder, save_encoder
from speechkd.probing import ProbeProtocol

WORDS = ("zero", "one")
SPEAKERS = ("ann", "bob", "cy", "di")  # di says what is tested
DRINKS = ("latte", "mocha")
TINY = MiniProtocol(
    labels=ProbeProtocol(num_steps=40, batch_size=8, learning_rate=2e-2, hidden_size=8),
    strings=ProbeProtocol(num_steps=3, batch_size=4, hidden_size=8),
    speakers=ProbeProtocol(num_steps=2, batch_size=4, hidden_size=8, pooled_size=8),
    num_trials=8,
    queries_per_word=2,
)


def tone_row(folder, key, seconds, pitch_hz, **fields):
    write_tone(folder / f"audio/{key}.flac", seconds, pitch_hz=pitch_hz)
    return {
        "id": key,
        "audio": f"audio/{key}.flac",
        "duration_seconds": seconds,
        "sample_rate_hz": 16_000,
        **fields,
    }


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Folder with fsdd and barista, whose words and drinks are low and high tones, and two tiny encoders."""
    folder = tmp_path_factory.mktemp("corpora")
    pitches_hz = (200.0, 1600.0)
    for split, speakers in (("train", SPEAKERS[:3]), ("test", SPEAKERS[3:])):
        digits = [
            tone_row(
                folder / "fsdd",
                f"{digit}_{speaker}_{number}",
                0.3,
                pitches_hz[digit] + 10 * SPEAKERS.index(speaker) + number,
                text=WORDS[digit],
                speaker=speaker,
            )
            for digit in range(2)
            for speaker in speakers
            for number in (0, 5, 6)
        ]
        write_manifest(folder / f"fsdd/digits_{split}.jsonl", digits)
        strings = [
            tone_row(
                folder / "fsdd",
                f"{split}-{index}",
                1.2,
                pitches_hz[index % 2] + index,
                text=WORDS[index % 2],
                speaker=speakers[0],
            )
            for index in range(4)
        ]
        write_manifest(folder / f"fsdd/{split}.jsonl", strings)
    for split, number in (("train", 6), ("dev", 2), ("test", 4)):
        orders = [
            tone_row(
                folder / "barista",
                f"{split}-order-{index}",
                2.1,
                pitches_hz[index % 2] + index,
                intent="orderDrink",
                slots=[{"name": "coffeeDrink", "value": DRINKS[index % 2]}],
            )
            for index in range(number)
        ]
        write_manifest(folder / f"barista/{split}.jsonl", orders)
    save_hubert(folder / "hubert", feat_extract_norm="layer")
    save_whisper(folder / "whisper")
    return folder


def run(corpora, output, **encoders):
    sources = {name: source.replace("HERE", str(corpora)) for name, source in encoders.items()}
    return probe.probe_encoders(
        sources, corpora / "fsdd", corpora / "barista", output, seeds=(0, 1), protocol=TINY, device="cpu"
    )


def test_every_kind_of_encoder_gets_all_scores(corpora, tmp_path):
    output = tmp_path / "probes.json"
    content = run(
        corpora, output, whisper="HERE/whisper", hubert="HERE/hubert", fresh="random:HERE/hubert", log_mel="log-mel"
    )
    assert json.loads(output.read_text()) == content and list(content["encoders"])[0] == "whisper"
    for encoder in content["encoders"].values():
        assert encoder["scores"].keys() == SCORES.keys() and len(encoder["scores"]["eer"]["values"]) == 2
        assert encoder["head_seconds"].keys() >= {"keyword", "verification", "strings"}
    assert len({encoder["weights_sha256"] for encoder in content["encoders"].values()}) == 4
    scores = content["encoders"]["log_mel"]["scores"]
    assert scores["keyword_accuracy"]["mean"] == scores["slot_exact_match"]["mean"] == 100
    # a Whisper hears digits in 1 s, strings in 2 s and orders in 3 s, and of orders only means are kept
    folders = {path.name.split("float16-")[1] for path in (tmp_path / "features").iterdir() if "3layers" in path.name}
    grid = {"1s-grid0.64-frames", "2s-grid0.64-frames", "3s-grid0.64-mean"}  # of Whispers
    assert folders == {*grid, "whole-frames", "whole-mean"}
    lines = format_table(content).splitlines()
    assert lines[2].startswith("| whisper | 3 x 16 | ") and sum(line.startswith("| hubert |") for line in lines) == 2


def test_an_encoder_that_is_done_is_not_done_again_unless_its_weights_changed(corpora, tmp_path, monkeypatch):
    shutil.copytree(corpora / "hubert", tmp_path / "hubert")
    encoders = {"student": str(tmp_path / "hubert"), "baseline": "log-mel"}
    real, done = probe._probe, []

    def probe_until_killed(source, *arguments):
        done.append(source)
        if len(done) == 2:
            raise KeyboardInterrupt
        return real(source, *arguments)

    monkeypatch.setattr(probe, "_probe", probe_until_killed)
    with pytest.raises(KeyboardInterrupt):
        run(corpora, tmp_path / "probes.json", **encoders)
    assert list(json.loads((tmp_path / "probes.json").read_text())["encoders"]) == ["student"]
    run(corpora, tmp_path / "probes.json", **encoders)
    assert done == [encoders["student"], "log-mel", "log-mel"]

    encoder, _ = load_encoder(encoders["student"])
    with torch.no_grad():
        encoder.encoder.layers[0].attention.k_proj.weight.add_(0.1)
    save_encoder(encoder, encoders["student"], normalize_input=False)
    content = run(corpora, tmp_path / "probes.json", student=encoders["student"])
    assert done[3:] == [encoders["student"]] and list(content["encoders"]) == ["student", "baseline"]


def test_results_of_other_settings_are_not_mixed(corpora, tmp_path):
    output = tmp_path / "probes.json"
    output.write_text(json.dumps({"settings": {"seeds": [0], "protocol": {}}, "encoders": {}}))
    with pytest.raises(ValueError, match="holds results of other seeds and protocol and manifests_sha256"):
        run(corpora, output, baseline="log-mel")


def test_the_command_writes_the_table_into_a_readme(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "MiniProtocol", lambda: TINY)
    (tmp_path / "README.md").write_text("before\n<!-- probes -->\nold\n<!-- /probes -->\nafter\n")
    common = ["--readme", str(tmp_path / "README.md"), "--marker", "probes"]
    arguments = ["--encoders", f"teacher={corpora}/hubert", "filters=log-mel", "--fsdd-dir", str(corpora / "fsdd")]
    arguments += ["--barista-dir", str(corpora / "barista"), "--output", str(tmp_path / "probes.json")]
    probe.main([*arguments, "--seeds", "0", "--device", "cpu", *common])
    readme = (tmp_path / "README.md").read_text()
    assert "\nold\n" not in readme and readme.startswith("before\n") and readme.endswith("after\n")
    assert "| teacher | 3 x 32 | " in readme and "| filters | 1 x 80 | " in readme and "±" not in readme
    assert json.loads((tmp_path / "probes.json").read_text())["command"].startswith("python recipes/distilhubert/")
    tabulate_probes.main([str(tmp_path / "probes.json"), *common])
    assert (tmp_path / "README.md").read_text() == readme


def made_up(**means):
    """Results of encoders with these means of all accuracies, and 100 less of all error rates."""
    return {
        "settings": {"seeds": [0, 1], "protocol": json.loads(json.dumps(MiniProtocol(), default=vars))},
        "encoders": {
            name: {
                "source": "log-mel" if name == "filters" else f"exp/{name}",
                "weights_sha256": f"{name} {value}",
                "num_layers": 3,
                "width": 32,
                "scores": {
                    score: {
                        "mean": 100 - value if score in ERRORS else value,
                        "deviation": 0.5,
                        "values": [value, value],
                    }
                    for score in SCORES
                },
                "head_seconds": {"keyword": 61.0},
                "device": "a processor",
                "date": "2026-11-30",
            }
            for name, value in means.items()
        },
    }


def test_a_student_keeps_what_it_has_of_the_teachers_lead():
    content = made_up(teacher=90.0, student=75.0, filters=30.0)
    content["encoders"]["student"]["scores"]["eer"]["mean"] = 70.0  # as bad as log-mel
    content["encoders"]["teacher"]["scores"]["cer"]["mean"] = 71.0  # no lead over log-mel
    shares = retained(content)["student"]
    assert shares["keyword_accuracy"] == shares["wer"] == 0.75 and shares["eer"] == 0 and shares["cer"] is None
    table = format_table(content)
    assert "| student | 3 x 32 | 75.0 ± 0.5 | " in table
    row = next(line for line in table.splitlines() if line.startswith("| student | 75 |"))
    assert row.endswith("| - | 75 | 68 |")
    assert retained(made_up(teacher=90.0, student=75.0)) == {} and "kept" not in format_table(made_up(teacher=90.0))


def test_encoders_of_several_seeds_are_one_row_with_their_own_deviation():
    students = {f"student-seed{seed}": 60.0 + 10 * seed for seed in range(3)}
    content = made_up(teacher=90.0, **students, filters=30.0, **{"student-wide": 40.0})
    again = {**content["encoders"]["student-seed0"], "source": "exp/copy"}
    content["encoders"]["student-seed9"] = again  # the same weights count once
    grouped = tabulate_probes.group_by_name(content)
    assert list(grouped["encoders"]) == ["teacher", "student", "filters", "student-wide"]
    assert grouped["encoders"]["student"]["scores"]["wer"] == {
        "mean": 30.0,
        "deviation": 10.0,
        "values": [40.0, 30.0, 20.0],
    }
    table = format_table(grouped)
    assert "| student | 3 x 32 | 70.0 ± 10.0 | " in table and "| teacher | 3 x 32 | 90.0 ± 0.5 | " in table
    assert next(line for line in table.splitlines() if line.startswith("| student | 67 |"))  # (70 - 30) / (90 - 30)
    assert "Of student: mean and deviation over 3 encoders, not over heads." in table and "Of teacher" not in table
    assert "student-seed1" in format_table(content)
    content["encoders"]["student-seed1"]["width"] = 64
    with pytest.raises(SystemExit, match="encoders of the name student differ in layers or width"):
        tabulate_probes.group_by_name(content)


def test_files_of_several_runs_make_one_table(tmp_path, capsys):
    for seed in range(2):
        content = made_up(teacher=90.0, **{f"student-seed{seed}": 60.0 + 10 * seed}, filters=30.0)
        (tmp_path / f"{seed}.json").write_text(json.dumps(content))
    files = [str(tmp_path / f"{seed}.json") for seed in range(2)]
    tabulate_probes.main([*files, "--group-by", "name"])
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows == ["encoder", "teacher", "student", "filters", "kept of the teacher's lead, %", "student"]
    for changed, message in (
        ({"settings": {}}, "1.json holds scores of other settings than .*0.json"),
        ({"encoders": made_up(teacher=80.0)["encoders"]}, "encoder 'teacher' of .*1.json has other weights"),
    ):
        (tmp_path / "1.json").write_text(json.dumps({**content, **changed}))
        with pytest.raises(SystemExit, match=message):
            tabulate_probes.main(files)
    with pytest.raises(SystemExit, match="2.json does not exist; run recipes/distilhubert/probe.py first"):
        tabulate_probes.main([*files, str(tmp_path / "2.json")])


@pytest.mark.parametrize(
    ("encoders", "message"),
    [
        (["teacher"], "encoder 'teacher' is not NAME=PATH"),
        (["a=log-mel", "a=log-mel"], "encoder 'a=log-mel' is not NAME=PATH with a name of its own"),
        (["a=random:log-mel"], "log-mel has no weights to draw anew"),
        (["a=log-mel", "b=./absent"], "model folder './absent' does not exist"),
    ],
)
def test_encoders_that_cannot_be_are_refused_before_any_is_probed(encoders, message, corpora, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "_probe", None)
    monkeypatch.setattr(probe, "MiniProtocol", lambda: TINY)
    arguments = ["--encoders", *encoders, "--fsdd-dir", str(corpora / "fsdd")]
    arguments += ["--barista-dir", str(corpora / "barista"), "--output", str(tmp_path / "probes.json")]
    with pytest.raises(ValueError, match=message):
        probe.main(arguments)


def test_a_clip_without_audio_ends_the_run_as_encoders_would_not_compare(corpora, tmp_path):
    shutil.copytree(corpora / "fsdd", tmp_path / "fsdd")
    (tmp_path / "fsdd/audio/0_ann_0.flac").write_bytes(b"no audio")
    with pytest.raises(AudioError, match="0_ann_0"):
        probe.probe_encoders(
            {"a": "log-mel"}, tmp_path / "fsdd", corpora / "barista", tmp_path / "out.json", protocol=TINY, device="cpu"
        )


def test_the_protocol_keeps_to_small_budgets_and_the_same_items_for_all(corpora):
    protocol = MiniProtocol()
    assert max(part.num_steps for part in (protocol.labels, protocol.strings, protocol.speakers)) <= 2000
    tasks, again = (make_tasks(read_corpora(corpora / "fsdd", corpora / "barista"), TINY, (0, 1)) for _ in range(2))
    assert [fold.trials for fold in tasks.verification] == [fold.trials for fold in again.verification]
    assert tasks.queries[0].queries == again.queries[0].queries and len(tasks.strangers) == len(SPEAKERS)
    assert len(tasks.slots.train) == 8 and len(tasks.slots.test) == 4
