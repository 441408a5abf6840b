"""`speechkd evaluate --task` of SUPERB on tiny random encoders and tones: what is checked, kept and written."""

import json
from dataclasses import replace

import pytest
from conftest import write_tone
from test_features_store import save_hubert, save_whisper

from speechkd import probe
from speechkd.cli import main
from speechkd.command_line import PROBE_TASKS, make_parser
from speechkd.data.manifest import write_manifest
from speechkd.probe import evaluate_probe
from speechkd.probing_tasks import SUPERB

PITCHES_HZ = {"low": 200.0, "high": 1600.0}
QUICK = {"num_steps": 40, "learning_rate": 1e-2}


@pytest.fixture(autouse=True)
def small_heads(monkeypatch):
    """SUPERB's recurrent heads have 40 million weights."""
    monkeypatch.setattr(
        probe, "SUPERB", {task: replace(protocol, hidden_size=16, pooled_size=16) for task, protocol in SUPERB.items()}
    )


def write_tones(folder, name, number):
    """A manifest of so many low and high tones, each the only word of its speaker."""
    rows = []
    for index in range(number):
        word = sorted(PITCHES_HZ)[index % 2]
        path = folder / f"audio/{name}-{index}.wav"
        write_tone(path, 0.4, pitch_hz=PITCHES_HZ[word] * (1 + index / 100))
        rows.append(
            {
                "id": f"{name}-{index}",
                "audio": f"audio/{path.name}",
                "duration_seconds": 0.4,
                "sample_rate_hz": 16_000,
                "text": word,
                "speaker": f"{word} voice",
                "intent": word,
                "slots": [{"name": "pitch", "value": word}, {"name": "kind", "value": "tone"}],
            }
        )
    write_manifest(folder / f"{name}.jsonl", rows)
    return folder / f"{name}.jsonl"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Folder with train, dev and test tones, trials among the latter, and two tiny encoders."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, number in (("train", 8), ("dev", 4), ("test", 4)):
        write_tones(folder, name, number)
    trials = [f"{int(a % 2 == b % 2)} test-{a} test-{b}" for a in range(4) for b in range(a)]
    (folder / "trials.txt").write_text("\n".join(trials))
    save_hubert(folder / "hubert", feat_extract_norm="layer")
    save_whisper(folder / "whisper")
    return folder


def run(corpus, task, output_dir, model="log-mel", **options):
    options = {**QUICK, "train_manifest": corpus / "train.jsonl", **options}
    return evaluate_probe(task, model, corpus / "test.jsonl", output_dir, **options)


def test_a_head_on_filter_banks_tells_low_tones_from_high_ones(corpus, tmp_path):
    metrics = run(corpus, "ks", tmp_path / "out", dev_manifest=corpus / "dev.jsonl", seeds=(0, 1))
    assert metrics["scores"] == {"accuracy": {"mean": 100.0, "deviation": 0.0, "values": [100.0, 100.0]}}
    assert metrics["num_items"] == 4 and metrics["num_skipped"] == {} and len(metrics["head_seconds"]) == 2
    assert metrics["protocol"]["num_steps"] == 40 and metrics["protocol"]["balanced"]
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == metrics


@pytest.mark.parametrize(
    ("task", "model", "options", "names"),
    [
        ("ic", "hubert", {}, {"exact_match", "label_accuracy"}),
        ("sid", "whisper", {}, {"accuracy"}),
        ("er", "log-mel", {}, {"accuracy"}),
        ("pr", "hubert", {}, {"per"}),
        ("asr", "log-mel", {"num_steps": 2}, {"wer", "cer"}),
        ("sf", "log-mel", {"num_steps": 2}, {"slot_f1", "slot_cer"}),
        ("sv", "hubert", {"num_steps": 2, "trials": "trials.txt"}, {"eer", "min_dcf_0.05"}),
    ],
)
def test_every_task_gives_its_scores_and_the_encoder_behind_them(task, model, options, names, corpus, tmp_path):
    options = {key: corpus / value if key == "trials" else value for key, value in options.items()}
    metrics = run(corpus, task, tmp_path / "out", model if model == "log-mel" else str(corpus / model), **options)
    assert set(metrics["scores"]) == names and metrics["task"] == task
    assert metrics["num_layers"] == (1 if model == "log-mel" else 3) and len(metrics["weights_sha256"]) == 64
    assert metrics["num_items"] == (6 if task == "sv" else 4)


def test_query_by_example_trains_nothing_and_names_its_layer(corpus, tmp_path):
    metrics = evaluate_probe(
        "qbe",
        str(corpus / "hubert"),
        corpus / "test.jsonl",
        tmp_path / "out",
        queries=corpus / "train.jsonl",
        dev_queries=corpus / "dev.jsonl",
    )
    assert metrics["scores"].keys() == {"mtwv", "top1"} and metrics["layer"] in range(3)
    assert metrics["protocol"] is None and metrics["num_items"] == 8


def test_what_a_kill_left_is_neither_encoded_nor_trained_again(corpus, tmp_path, monkeypatch):
    score_task, asked = probe.score_task, []

    def score_until_killed(*arguments, seed, **options):
        asked.append(seed)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return score_task(*arguments, seed=seed, **options)

    monkeypatch.setattr(probe, "score_task", score_until_killed)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, "ks", tmp_path / "out", seeds=(3, 4))
    assert not (tmp_path / "out/metrics.json").exists()
    shards = sorted((tmp_path / "out/features").rglob("shard-*.safetensors"))
    written = [path.stat().st_mtime_ns for path in shards]
    metrics = run(corpus, "ks", tmp_path / "out", seeds=(3, 4))
    assert asked == [3, 4, 4] and metrics["seeds"] == [3, 4]
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "out/features").rglob("shard-*.safetensors"))] == (
        written
    )
    with pytest.raises(ValueError, match="out holds results of other settings: protocol was .* remove probe_runs"):
        run(corpus, "ks", tmp_path / "out", seeds=(3,), num_steps=41)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("ks", {"train_manifest": None}, "task ks trains a head; give --train-manifest"),
        ("ks", {"train_manifest": "test.jsonl"}, "'test-0' is in .*test.jsonl and in .*test.jsonl; give manifests of"),
        ("ks", {"trials": "trials.txt"}, "task ks does not use --trials"),
        ("ks", {"queries": "dev.jsonl"}, "task ks does not use --queries"),
        ("ks", {"seeds": ()}, r"one at least, got \[\]"),
        ("ks", {"seeds": (1, 1)}, r"must be different numbers .* got \[1, 1\]"),
        ("ks", {"num_steps": 0}, "num_steps, batch_size, .* must be 1 or more"),
        ("ks", {"dev_manifest": "absent.jsonl"}, "absent.jsonl does not exist"),
        ("ks", {"train_manifest": "one_class.jsonl"}, "have the same intent, so there is nothing to learn; choose"),
        ("sv", {}, "task sv scores pairs of clips; give --trials"),
        ("sv", {"trials": "trials.txt", "dev_manifest": "dev.jsonl"}, "task sv does not use --dev-manifest"),
        ("sv", {"trials": "same.txt"}, "1 of 1 trials are of one speaker"),
        ("sv", {"trials": "trials.txt", "train_manifest": "one_class.jsonl"}, "'high voice' alone"),
        ("qbe", {}, "task qbe does not use --train-manifest"),
        ("qbe", {"train_manifest": None, "num_steps": None, "learning_rate": None}, "give --queries, and --dev-quer"),
        ("qbe", {"train_manifest": None}, "task qbe trains nothing"),
    ],
)
def test_bad_input_is_refused_before_the_encoder_is_loaded(task, options, message, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "load_frame_encoder", None)
    (corpus / "same.txt").write_text("1 test-0 test-2\n")
    train = [json.loads(line) for line in (corpus / "train.jsonl").read_text().splitlines()]
    write_manifest(corpus / "one_class.jsonl", [row for row in train if row["intent"] == "high"])
    files = {key: corpus / value if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(ValueError, match=message):
        run(corpus, task, tmp_path / "out", **files)
    assert not (tmp_path / "out").exists()


def test_the_command_probes_and_prints_what_it_wrote(corpus, tmp_path, capsys):
    command = ["evaluate", "--task", "asr", "--model", "log-mel", "--manifest", str(corpus / "test.jsonl")]
    command += ["--train-manifest", str(corpus / "train.jsonl"), "--output-dir", str(tmp_path / "out")]
    command += ["--features-dir", str(tmp_path / "features"), "--seeds", "0", "1", "--num-steps", "1"]
    main([*command, "--json"])
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["scores"].keys() == {"wer", "cer"} and metrics["seeds"] == [0, 1]
    assert metrics == json.loads((tmp_path / "out/metrics.json").read_text())
    assert list((tmp_path / "features").iterdir())
    main(command)
    assert "wer: mean " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "ks"], "evaluate --task ks needs --model and --manifest and --output-dir"),
        (["--task", "sid", "--gold", "g"], "evaluate --task sid does not use --gold"),
        (["--task", "pr", "--long-form", "chunked"], "evaluate --task pr does not use --long-form"),
        (["--seeds", "1"], "evaluate --task asr does not use --seeds; leave out or choose --task, or probe with --tra"),
        (["--task", "er", "--batch-size", "auto"], "--batch-size auto is for transcription"),
    ],
)
def test_the_command_says_what_a_task_lacks_or_does_not_use(arguments, message, capsys):
    if "needs" not in message:
        arguments = [*arguments, "--model", "m", "--manifest", "f", "--output-dir", "out"]
    with pytest.raises(SystemExit) as error:
        main(["evaluate", *arguments])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_the_parser_knows_the_tasks_of_the_library():
    assert set(PROBE_TASKS) == {*SUPERB, "qbe"}
    arguments = make_parser().parse_args(["evaluate", "--task", "qbe", "--dev-queries", "q.jsonl"])
    assert (arguments.command, arguments.task, arguments.dev_queries, arguments.seeds) == (
        "evaluate",
        "qbe",
        "q.jsonl",
        None,
    )
