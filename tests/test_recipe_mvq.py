"""recipes/mvq on tiny random models and generated audio: targets at the student's frames, losses, runs, refusals."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, write_tone
from recipe_runs import facts_of, forget_the_end, log_of, run_sh, saved_teacher, student_of

sys.path.append(str(ROOT / "recipes/mvq"))  # behind the others: its train.py is loaded by path

import encode_teacher
import recognize
from recognition_corpora import DataConfig, TokensConfig, build_set, collate_recognition, spoken_texts
from recognition_objective import LossConfig, count_items, loss_terms, make_head, regression_loss
from teacher_targets import FrameAlignment, Targets, TeacherConfig, collate_targets, open_targets

from speechkd.check_config import check_config
from speechkd.config import parse_config
from speechkd.data.augment import SpecAugmentConfig
from speechkd.data.manifest import read_manifest, write_manifest
from speechkd.estimate import load_recipe
from speechkd.features_store import fill_states
from speechkd.frame_encoders import load_frame_encoder
from speechkd.labels.filters import FilterConfig
from speechkd.labels.mvq_labels import fit_quantizer, label_codes
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError, create_store
from speechkd.losses.codebook import CodebookPredictor
from speechkd.models.quantizer import QuantizerError, load_quantizer
from speechkd.models.quantizer_fit import FitConfig
from speechkd.models.recognizer import DistilledRecognizer, RecognizerConfig, RecognizerInputs, RecognizerModel
from speechkd.models.recognizer_decoding import Recognizer

RECIPE = ROOT / "recipes/mvq"
YAMLS = sorted(RECIPE.glob("*.yaml"))
TEXTS = ["one two", "a tone", "two", "one", "a tone two", "one two"]
QUICK = FitConfig(bytes_per_frame=2, phase1_steps=3, phase2_steps=3, batch_size=64)
train = load_recipe(RECIPE / "train.py")


def write_tones(folder: Path, name: str = "clips", texts: list[str | None] = TEXTS) -> Path:
    """Clips of 1 to 2 s with texts."""
    rows = []
    for index, text in enumerate(texts):
        seconds = 1.0 + 0.2 * index
        write_tone(folder / f"audio/{name}-{index}.wav", seconds, pitch_hz=200 + 50 * index)
        row = {"id": f"{name}-{index}", "audio": f"audio/{name}-{index}.wav", "duration_seconds": seconds}
        rows.append({**row, "sample_rate_hz": 16_000, "text": text})
    write_manifest(folder / f"{name}.jsonl", rows)
    return folder / f"{name}.jsonl"


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A manifest, two teachers, a quantizer with codes, and states."""
    folder = tmp_path_factory.mktemp("mvq-recipe")
    manifest = write_tones(folder)
    saved_teacher(folder / "hubert", "hubert")
    saved_teacher(folder / "other", "hubert", intermediate_size=40)
    for layer in (1, 2):
        fit_quantizer(str(folder / "hubert"), layer, manifest, folder / f"quantizer{layer}", config=QUICK)
    label_codes(str(folder / "hubert"), [folder / "quantizer2"], manifest, folder / "codes/train")
    fill_states(
        load_frame_encoder(str(folder / "hubert"), layers=[2]), read_manifest(manifest), folder / "states/train"
    )
    return folder


def teacher_of(place: Path, **changes: Any) -> TeacherConfig:
    known = {"name": str(place / "hubert"), "layer": 2, "quantizer_dir": str(place / "quantizer2")}
    stores = {"codes_dir": str(place / "codes"), "states_dir": str(place / "states")}
    return TeacherConfig(**{**known, **stores, **changes})


def opened(place: Path, kd: str, *, delay_frames: int = 0, rate_hz: float = 25.0, **changes: Any) -> Targets:
    targets = open_targets(teacher_of(place, **changes), kd, rate_hz, "train", delay_frames=delay_frames)
    assert targets is not None
    return targets


def small_config(num_symbols: int, **changes: Any) -> RecognizerConfig:
    sizes = {"width": 16, "num_layers": 3, "num_heads": 2, "ffn_width": 32, "kernel_size": 5, "joint_width": 16}
    return RecognizerConfig(num_symbols=num_symbols, dropout=0.0, **{**sizes, **changes})


def built(place: Path, targets: Targets | None, tmp_path: Path, **changes: Any):
    """A batch of all clips, and a student with a head for it."""
    manifest, data = read_manifest(place / "clips.jsonl"), data_of(place / "clips.jsonl")
    texts, _ = spoken_texts(data, "train", manifest, FilterConfig())
    tokens = TokensConfig().make(list(texts.values()))
    config = small_config(len(tokens), **changes)
    stored = None if targets is None or targets.store is None else targets
    clips, _ = build_set(manifest, texts, tokens, config, data, tmp_path / "run", stored)
    torch.manual_seed(0)
    return collate_recognition([clips[index] for index in range(len(clips))]), config


def data_of(manifest: Path, **changes: Any) -> DataConfig:
    return DataConfig(**({"train_manifest": str(manifest), "test_manifest": str(manifest)} | changes))


def student_with(config: RecognizerConfig, weights: LossConfig, targets: Targets | None) -> DistilledRecognizer:
    torch.manual_seed(0)
    return DistilledRecognizer(RecognizerModel(config), make_head(weights, config.width, targets))


# targets at the student's frames


def test_two_frames_of_the_teacher_stand_side_by_side_and_the_delay_moves_them():
    states = torch.arange(7.0)[:, None] + torch.tensor([[0.0, 100.0]])
    found, mask = FrameAlignment(50.0, 25.0).states(states, 4)
    assert found[..., 0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 0]]
    assert mask.tolist() == [[True, True]] * 3 + [[True, False]]
    late, mask = FrameAlignment(50.0, 25.0, delay_frames=1).states(states, 4)
    assert late[1:, :, 0].tolist() == [[0, 1], [2, 3], [4, 5]] and not mask[0].any()
    codes = FrameAlignment(50.0, 25.0).codes(states.long(), 4)
    assert codes.tolist()[:2] == [[0, 100, 1, 101], [2, 102, 3, 103]] and codes[3].tolist() == [6, 106, -100, -100]
    same, mask = FrameAlignment(50.0, 50.0).states(states, 7)
    assert same[:, 0].equal(states) and mask.all()


def test_stored_targets_of_a_clip_are_those_of_the_live_teacher(place, tmp_path):
    for kd in ("mvq", "l2"):
        targets, live = opened(place, kd), opened(place, kd, codes_dir=None, states_dir=None)
        batch, _ = built(place, targets, tmp_path / kd)
        waveforms = batch["waveforms"].float() / 32768
        found = live.live(waveforms, batch["num_samples"], batch["num_frames"])
        if kd == "mvq":
            assert found["codes"].shape == batch["codes"].shape and found["codes"].shape[2] == 4
            same = found["codes"] == batch["codes"]  # of a tone, entries may be as near as each other
            assert same.all(dim=-1).float().mean() > 0.7
            assert ((found["codes"] == -100) == (batch["codes"] == -100)).all()
        else:
            assert found["states_mask"].equal(batch["states_mask"])
            torch.testing.assert_close(found["states"], batch["states"].float(), rtol=0, atol=5e-3)


def test_a_clip_without_codes_learns_from_its_text_alone_and_too_many_are_refused(place, tmp_path, caplog):
    targets, manifest = opened(place, "mvq"), read_manifest(place / "clips.jsonl")
    store = create_store(tmp_path / "codes", targets.store.header)
    rows = [row for row in targets.store.rows() if row["id"] != "clips-2"]
    store.write_shard(rows, {f"mvq/{row['id']}": targets.store.array(f"mvq/{row['id']}") for row in rows})
    lacking = Targets(**{**vars(targets), "store": store})
    texts = dict(zip(manifest.ids, TEXTS, strict=True))
    tokens = TokensConfig().make(TEXTS)
    arguments = (manifest, texts, tokens, small_config(len(tokens)))
    strict = data_of(place / "clips.jsonl")
    with pytest.raises(ValueError, match="1 of 6 utterances .* have no targets of the teacher in .*max_skipped"):
        build_set(*arguments, strict, tmp_path / "run", lacking)
    clips, counts = build_set(
        *arguments, data_of(place / "clips.jsonl", max_skipped_fraction=0.2), tmp_path / "run", lacking
    )
    assert counts["num_without_targets"] == 1 and "1 of 6 utterances" in caplog.text
    batch = collate_recognition([clips[index] for index in range(6)])
    assert (batch["codes"][2] == -100).all() and (batch["codes"][1] >= 0).any()
    weights = LossConfig()
    student = student_with(small_config(len(tokens)), weights, lacking)
    loss, terms = loss_terms(student, None, batch, weights=weights, inputs=RecognizerInputs())
    assert loss.isfinite() and terms["mvq"] > 0


def test_targets_of_another_teacher_quantizer_layer_or_rate_are_refused(place, tmp_path):
    ids = [load_quantizer(place / f"quantizer{layer}").id for layer in (1, 2)]
    with pytest.raises(LabelStoreError, match=f"codes of quantizer {ids[1]}.*but this is quantizer {ids[0]}"):
        opened(place, "mvq", quantizer_dir=str(place / "quantizer1"), layer=1)
    with pytest.raises(QuantizerError, match=f"quantizer {ids[1]} in .* is of layer 2, but teacher.layer=1"):
        opened(place, "mvq", layer=1)
    with pytest.raises(LabelStoreError, match=f"come from teacher {place}/hubert, but teacher.name={place}/other"):
        opened(place, "mvq", name=str(place / "other"))
    with pytest.raises(QuantizerError, match=f"quantizer {ids[1]} .* fitted on teacher .*hubert .* has .*other"):
        opened(place, "mvq", name=str(place / "other"), codes_dir=None)
    with pytest.raises(LabelStoreError, match=r"holds states of layers \[2\], but states of layer 1 are asked for"):
        opened(place, "l1", layer=1)
    with pytest.raises(LabelStoreError, match=r"holds targets \['mvq'\], but states of layer 2"):
        opened(place, "l1", states_dir=str(place / "codes"))
    targets = opened(place, "mvq")
    with pytest.raises(LabelStoreError, match="utterance 'clips-5': 99 frames of codes at .* are not those of 60 stud"):
        targets.check_lengths({"clips-5": 60}, {"clips-5": 99})
    with pytest.raises(ValueError, match="is 1.67 times student_rate_hz=30"):
        opened(place, "mvq", rate_hz=30.0).check_lengths({"clips-5": 60}, {"clips-5": 99})
    with pytest.raises(ValueError, match="layer 9 is not one of 0 to 4"):
        load_frame_encoder(str(place / "hubert"), layers=[9])


def test_stored_states_are_those_of_each_clip_in_float16(place):
    store = LabelStore(place / "states/train")
    header = store.header["hidden_states"]
    assert (header["layers"], header["width"], header["frame_rate_hz"], header["dtype"]) == ([2], 32, 50.0, "float16")
    live = opened(place, "l1", states_dir=None)
    for row in store.rows():
        states = store.array(row["id"])
        assert states.dtype == torch.float16 and states.shape == (1, row["num_frames"], 32)
    waveform = torch.zeros(1, 16_000)
    assert live.live(waveform, [16_000], [25])["states"].shape == (1, 25, 2, 32)


# the objective


@pytest.mark.parametrize("kd", ["none", "l1", "l2", "mvq"])
@pytest.mark.parametrize("head", ["ctc", "transducer"])
def test_the_loss_is_the_recognizers_and_a_weight_times_the_teachers(kd, head, place, tmp_path):
    targets = None if kd == "none" else opened(place, kd)
    batch, config = built(place, targets, tmp_path, head=head)
    weights, inputs = LossConfig(kd=kd, weight=0.7, layer=2), RecognizerInputs()
    student = student_with(config, weights, targets).eval()
    loss, terms = loss_terms(student, None, batch, weights=weights, inputs=inputs)
    with torch.no_grad():
        features = inputs(batch["waveforms"].float() / 32768, torch.tensor(batch["num_samples"]))
        states, num_frames = student.recognizer(*features)
        own = student.recognizer.loss(states[-1], num_frames, batch["targets"])
    assert terms[head].item() == pytest.approx(own.item(), rel=1e-5)
    assert num_frames.tolist() == batch["num_frames"] and count_items(batch) == num_frames.sum()
    if kd == "none":
        assert loss.item() == pytest.approx(own.item()) and student.head is None
        return
    expected = 0.0
    for row, frames in enumerate(batch["num_frames"]):
        for frame in range(frames):
            hidden = states[1][row, frame]
            if kd == "mvq":
                for code, (weight, bias) in zip(
                    batch["codes"][row, frame].tolist(),
                    zip(student.head.weight, student.head.bias, strict=True),
                    strict=True,
                ):
                    if code != -100:
                        expected -= (weight @ hidden + bias).log_softmax(dim=-1)[code].item() / 4
                continue
            predicted = student.head(hidden).view(2, 32)
            for half in range(2):
                if batch["states_mask"][row, frame, half]:
                    truth = F.layer_norm(batch["states"][row, frame, half].float(), (32,))
                    difference = predicted[half] - truth
                    distance = difference.abs() if kd == "l1" else difference.square()
                    expected += distance.mean().item() / 2
    assert terms[kd].item() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(own.item() + 0.7 * expected, rel=1e-4)
    loss.backward()
    assert all(weight.grad is not None for weight in student.head.parameters())


def test_the_weight_of_codes_does_not_depend_on_their_number(place, tmp_path):
    targets = opened(place, "mvq")
    batch, config = built(place, targets, tmp_path)
    weights = LossConfig()
    student = student_with(config, weights, targets)
    with torch.no_grad():
        student.head.weight.zero_()  # all entries are as likely as each other
    _, terms = loss_terms(student, None, batch, weights=weights, inputs=RecognizerInputs())
    scored = (batch["codes"] != -100).sum().item() / 4
    assert terms["mvq"].item() == pytest.approx(scored * math.log(256), rel=1e-5)
    assert make_head(weights, 16, opened(place, "mvq", rate_hz=50.0)).num_codebooks == 2
    doubled = {**batch, "codes": torch.cat([batch["codes"]] * 2, dim=-1)}
    student.head = CodebookPredictor(16, 8)
    torch.nn.init.zeros_(student.head.weight)
    _, again = loss_terms(student, None, doubled, weights=weights, inputs=RecognizerInputs())
    assert again["mvq"].item() == pytest.approx(terms["mvq"].item(), rel=1e-5)


def test_joint_predictors_leave_out_frames_with_a_part_of_their_codes(place, tmp_path):
    targets = opened(place, "mvq")
    batch, config = built(place, targets, tmp_path)
    is_part = (batch["codes"] == -100).any(dim=-1) & (batch["codes"] != -100).any(dim=-1)
    assert is_part.any()  # 49 frames of HuBERT to 25
    weights = LossConfig(predictor="joint")
    student = student_with(config, weights, targets)
    loss, terms = loss_terms(student, None, batch, weights=weights, inputs=RecognizerInputs())
    loss.backward()
    assert terms["mvq"] > 0 and student.head.embedding.grad.any()


def test_regression_ignores_missing_frames_and_is_computed_in_float32():
    torch.manual_seed(0)
    hidden, states, head = torch.randn(2, 3, 4), torch.randn(2, 3, 2, 5), torch.nn.Linear(4, 10)
    mask = torch.ones(2, 3, 2, dtype=torch.bool)
    mask[1, 2] = False
    losses = []
    for _ in range(2):
        losses.append(regression_loss(hidden, states, mask, head, "l2").item())
        states[1, 2] = float("nan")
    assert losses[0] == losses[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert regression_loss(hidden, states, mask, head, "l2").item() == losses[0]


def test_masks_are_on_what_the_student_hears_in_training_alone(place, tmp_path):
    batch, config = built(place, None, tmp_path)
    weights = LossConfig(kd="none")
    student = student_with(config, weights, None)
    options = {"weights": weights, "inputs": RecognizerInputs(), "masks": SpecAugmentConfig(), "seed": 3}
    plain = loss_terms(student, None, batch, weights=weights, inputs=options["inputs"])[0].item()
    masked = [loss_terms(student.train(), None, {**batch, "epoch": e}, **options)[0].item() for e in (0, 0, 1)]
    assert masked[0] == masked[1] != masked[2] and plain not in masked
    assert loss_terms(student.eval(), None, batch, **options)[0].item() == plain


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="loss.layer=5, but the student has layers 1 to 4"):
        LossConfig(layer=5).layer_of(4)
    assert [LossConfig().layer_of(layers) for layers in (1, 4, 12)] == [1, 2, 6]
    with pytest.raises(ValueError, match="loss.weight must be 0 or more, got -1"):
        LossConfig(weight=-1)
    with pytest.raises(ValueError, match="loss.delay_frames must be 0 or more"):
        LossConfig(delay_frames=-1)


# texts


def test_texts_are_left_out_where_they_cannot_be_learnt(tmp_path):
    manifest = write_tones(tmp_path, texts=["one", None, "...", "x" * 40, "two", "one"])
    data, rows = data_of(manifest), read_manifest(manifest)
    texts, report = spoken_texts(data, "train", rows, FilterConfig())
    assert report == {"num_without_text": 1}
    tokens = TokensConfig().make(list(texts.values()))
    clips, counts = build_set(rows, texts, tokens, small_config(len(tokens)), data, tmp_path / "run")
    assert counts == {"num_undecodable": 0, "num_unreadable": 1, "num_too_fast": 1}
    assert [clips[index]["id"] for index in range(len(clips))] == ["clips-0", "clips-4", "clips-5"]
    few = TokensConfig().make(["one"])
    _, counts = build_set(rows, texts, few, small_config(len(few)), data, tmp_path / "run")
    assert counts["num_unreadable"] == 3  # "two" has letters that nobody has seen
    with pytest.raises(ValueError, match="no clip of .* can be trained on"):
        build_set(rows, {"clips-2": "..."}, tokens, small_config(len(tokens)), data, tmp_path / "run")
    write_tones(tmp_path, texts=[None, " "])
    with pytest.raises(ValueError, match="none of 2 utterances of .* has a text; set data.labels_dir and label it"):
        spoken_texts(data, "train", read_manifest(manifest), FilterConfig())


def label_store(folder: Path, said: dict[str, str], **header: Any) -> None:
    store = create_store(folder, {"teacher": {"name": "t", "weights_sha256": "0"}, "targets": ["text"]} | header)
    scores = {"mean_logprob": -0.1, "compression_ratio": 1.0, "finished": True, "duration_seconds": 1.0}
    store.write_shard([{"id": key, "text": text, **scores} for key, text in said.items()], {})


def test_transcripts_of_a_label_store_replace_the_text_and_are_filtered(tmp_path):
    manifest = write_tones(tmp_path)
    said = {f"clips-{index}": f"Coffee {index}." for index in range(6)} | {"clips-2": "", "clips-3": "ORDER"}
    label_store(tmp_path / "labels/train", said)
    data = data_of(manifest, labels_dir=str(tmp_path / "labels"))
    texts, report = spoken_texts(data, "train", read_manifest(manifest), FilterConfig())
    assert list(texts) == [f"clips-{index}" for index in (0, 1, 4, 5)] and texts["clips-0"] == "Coffee 0."
    assert report["num_without_text"] == 2 and report["filters"]["dropped"]["drop_empty"] == 1
    label_store(tmp_path / "few/train", {"clips-0": "a"})
    with pytest.raises(ValueError, match="5 of 6 utterances .* have no label in .*max_skipped_fraction=0.01; finish"):
        spoken_texts(
            data_of(manifest, labels_dir=str(tmp_path / "few")), "train", read_manifest(manifest), FilterConfig()
        )
    label_store(tmp_path / "packed/train", said, decoding={"pack": True})
    with pytest.raises(LabelStoreError, match="are of windows"):
        spoken_texts(
            data_of(manifest, labels_dir=str(tmp_path / "packed")), "train", read_manifest(manifest), FilterConfig()
        )


# configurations and runs


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_is_a_configuration(path):
    config, _ = parse_config(train.MvqConfig, ["--config", str(path), "--trainer.use_cpu=true", "--trainer.bf16=false"])
    assert config.trainer.output_dir == f"exp/mvq/{path.stem}" and config.loss.kd == "mvq"
    assert config.student.recognizer(28).frame_rate_hz == 25.0


def test_all_promised_datasets_have_a_recipe():
    assert [path.stem for path in YAMLS] == "barista fsdd librispeech_100 librispeech_960 quickstart".split()


def test_the_librispeech_recipes_have_the_papers_setting():
    for name, weight in (("librispeech_100", 0.1), ("librispeech_960", 0.01)):
        argv = ["--config", str(RECIPE / f"{name}.yaml"), "--trainer.use_cpu=true", "--trainer.bf16=false"]
        config, _ = parse_config(train.MvqConfig, argv)
        codes_of_a_frame = 16
        assert config.loss.weight == pytest.approx(weight * codes_of_a_frame)
        student = config.student.recognizer(500)
        assert (student.num_layers, student.width, student.num_heads, student.ffn_width) == (12, 512, 8, 2048)
        assert (config.teacher.layer, config.loss.layer, config.recognition.beam_size) == (36, 6, 4)
        assert config.trainer.average_last == 10 and config.student.spec_augment.max_frequency_mask_bins == 27


def arguments(path: Path, place: Path, folder: Path, *more: str) -> list[str]:
    manifest = place / "clips.jsonl"
    options = {
        "teacher.name": place / "hubert",
        "teacher.layer": 2,
        "teacher.quantizer_dir": folder / "quantizer",
        "teacher.codes_dir": folder / "codes",
        "teacher.states_dir": folder / "states",
        "quantizer.bytes_per_frame": 2,
        "quantizer.phase1_steps": 3,
        "quantizer.phase2_steps": 3,
        "data.train_manifest": manifest,
        "data.test_manifest": manifest,
        "data.labels_dir": "null",
        "data.max_batch_seconds": 8,
        "data.num_workers": 0,
        "tokens.num_symbols": 20,
        "student.size": "tiny",
        "student.num_layers": 2,
        "student.dropout": 0.0,
        "loss.layer": "null",
        "recognition.method": "greedy",
        "evaluation.reference": "text",
        "trainer.output_dir": folder / "run",
        "trainer.max_steps": 2,
        "trainer.save_steps": 1,
        "trainer.logging_steps": 1,
        "trainer.warmup_steps": 0,
        "trainer.eval_strategy": "no",
        "trainer.average_last": 0,
        "trainer.save_total_limit": 2,
        "trainer.bf16": "false",
        "trainer.use_cpu": "true",
    }
    if "dev_manifest" in path.read_text():
        options["data.dev_manifest"] = manifest
    return ["--config", str(path), *(f"--{key}={value}" for key, value in options.items()), *more]


@pytest.mark.recipe
@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_recipe_trains_two_steps_and_is_scored(path, place, tmp_path):
    argv = arguments(path, place, tmp_path)
    encode_teacher.main(argv)
    train.main(argv)
    run, facts = tmp_path / "run", facts_of(tmp_path / "run")
    assert facts["steps"] == 2 and facts["train_utterances"] == 6 and facts["teacher_outputs"] == "stored"
    assert facts["quantizer"] == load_quantizer(tmp_path / "quantizer").id and facts["kd"] == "mvq"
    assert facts["head_parameters"] == 2 * 2 * 256 * (144 + 1)
    student = Recognizer.from_pretrained(run / "student")
    assert student.model.num_parameters() == facts["parameters"]
    assert not any("head" in name.split(".")[0] for name in student_of(run))
    recognize.main(argv)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["num_utterances"] == 6 and metrics["decoding"] == "greedy" and metrics["num_reference_words"] == 11
    assert (run / "hypotheses.jsonl").read_text().count("\n") == 6
    card = (run / "student/README.md").read_text()
    assert "WER" in card and "layer 1 learnt its layer 2: codes of 2 bytes a frame" in card


@pytest.mark.recipe
@pytest.mark.parametrize("kd", ["none", "l1", "l2"])
def test_baselines_train_in_the_same_recipe(kd, place, tmp_path):
    argv = arguments(RECIPE / "fsdd.yaml", place, tmp_path, f"--loss.kd={kd}")
    encode_teacher.main(argv)
    train.main(argv)
    facts = facts_of(tmp_path / "run")
    assert facts["kd"] == kd and (facts["teacher"] is None) == (kd == "none")
    assert facts["head_parameters"] == (0 if kd == "none" else 2 * 32 * (144 + 1))
    assert (tmp_path / "states").exists() == (kd != "none") and not (tmp_path / "codes").exists()
    if kd != "none":
        assert log_of(tmp_path / "run")[0][f"loss/{kd}"] > 0


@pytest.mark.recipe
def test_a_streaming_student_may_be_late(place, tmp_path):
    more = ["--student.encoder=emformer", "--student.head=transducer", "--loss.delay_frames=2"]
    argv = arguments(RECIPE / "fsdd.yaml", place, tmp_path, *more)
    encode_teacher.main(argv)
    train.main(argv)
    facts = facts_of(tmp_path / "run")
    assert (facts["encoder"], facts["head"]) == ("emformer", "transducer")
    with pytest.raises(QuantizerError, match=f"quantizer {facts['quantizer']} in .* makes 2 bytes a frame, but .*=4"):
        encode_teacher.main([*argv, "--quantizer.bytes_per_frame=4"])
    recognize.main([*argv, "--recognition.method=beam", "--recognition.beam_size=2"])
    assert json.loads((tmp_path / "run/metrics.json").read_text())["decoding"] == "beam-2"


@pytest.mark.recipe
@pytest.mark.parametrize("kd", ["l2", "mvq"])
def test_a_live_teacher_gives_the_losses_of_stored_targets(kd, place, tmp_path):
    argv = arguments(RECIPE / "quickstart.yaml", place, tmp_path, f"--loss.kd={kd}")
    encode_teacher.main(argv)
    losses = []
    for name, more in (("stored", []), ("live", ["--teacher.codes_dir=null", "--teacher.states_dir=null"])):
        train.main([*argv, *more, f"--trainer.output_dir={tmp_path / name}"])
        assert facts_of(tmp_path / name)["teacher_outputs"] == name
        losses.append([row[f"loss/{kd}"] for row in log_of(tmp_path / name) if f"loss/{kd}" in row])
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.recipe
def test_a_resumed_run_ends_with_the_same_student_and_averages_its_checkpoints(place, tmp_path):
    argv = arguments(RECIPE / "fsdd.yaml", place, tmp_path, "--student.dropout=0.1", "--trainer.average_last=2")
    encode_teacher.main(argv)
    train.main(argv)
    first = student_of(tmp_path / "run")
    forget_the_end(tmp_path / "run", 2)
    train.main(argv)
    again = student_of(tmp_path / "run")
    assert all(again[name].equal(weight) for name, weight in first.items())


@pytest.mark.recipe
def test_a_development_set_is_scored_with_its_own_codes(place, tmp_path):
    more = [f"--data.dev_manifest={place / 'clips.jsonl'}", "--trainer.eval_strategy=steps", "--trainer.eval_steps=1"]
    argv = arguments(RECIPE / "fsdd.yaml", place, tmp_path, *more)
    encode_teacher.main(argv)
    train.main(argv)
    assert (tmp_path / "codes/dev/header.json").is_file()
    assert [row["eval_loss/mvq"] > 0 for row in log_of(tmp_path / "run") if "eval_loss/mvq" in row] == [True, True]


@pytest.mark.recipe
def test_doctor_checks_the_recipe_and_estimates_its_costs(place, tmp_path):
    test_manifest = write_tones(tmp_path, "test")
    argv = arguments(RECIPE / "quickstart.yaml", place, tmp_path, f"--data.test_manifest={test_manifest}")
    encode_teacher.main(argv)
    found = check_config(RECIPE / "quickstart.yaml", argv[2:])
    assert found["problems"] == [] and found["config"]["class"] == "MvqConfig"
    assert found["estimates"]["total_steps"] == 2


def test_configurations_that_cannot_work_are_refused(capsys):
    for more, message in (
        ("--teacher.quantizer_dir=null", "loss.kd=mvq needs teacher.quantizer_dir"),
        ("--evaluation.reference=teacher", "scores on transcripts of data.labels_dir, which is null"),
        ("--quantizer.bytes_per_frame=6", "bytes_per_frame must be a power of two, got 6"),
        ("--student.size=huge", "size"),
    ):
        with pytest.raises(SystemExit):
            parse_config(train.MvqConfig, ["--config", str(RECIPE / "fsdd.yaml"), "--trainer.use_cpu=true", more])
        assert message in capsys.readouterr().err


def test_run_sh_says_what_would_do(tmp_path):
    done = run_sh("mvq", tmp_path, "timit")
    assert done.returncode == 2 and "there are: barista fsdd librispeech_100" in done.stderr
    done = run_sh("mvq", tmp_path, "fsdd", "--stage", "6")
    assert done.returncode == 2 and "a stage is 1 to 5, not '6'" in done.stderr


@pytest.mark.recipe
def test_the_stages_end_with_a_scored_student_and_are_not_run_twice(place, tmp_path):
    options = [*arguments(RECIPE / "quickstart.yaml", place, tmp_path)[2:], "--stage", "2"]
    first = run_sh("mvq", tmp_path, "quickstart", *options)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "the texts are those of the manifests" in first.stdout and "WER" in first.stdout
    again = run_sh("mvq", tmp_path, "quickstart", *options)
    assert again.stdout.count("finished before, skipped") == 3
    none = run_sh(
        "mvq", tmp_path, "quickstart", *options, "--loss.kd=none", f"--trainer.output_dir={tmp_path / 'none'}"
    )
    assert none.returncode == 0 and "there is no teacher to run" in none.stdout


def test_padded_targets_of_a_batch_are_marked():
    batch = collate_targets([{"codes": torch.ones(2, 4).long()}, {"codes": torch.ones(3, 4).long()}])
    assert batch["codes"].shape == (2, 3, 4) and (batch["codes"][0, 2] == -100).all()
    states = {"states": torch.ones(2, 2, 3), "states_mask": torch.ones(2, 2).bool()}
    more = {"states": torch.ones(3, 2, 3), "states_mask": torch.ones(3, 2).bool()}
    batch = collate_targets([states, more])
    assert batch["states_mask"].tolist()[0] == [[True, True], [True, True], [False, False]]
