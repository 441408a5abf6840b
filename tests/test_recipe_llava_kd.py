"""recipes/llava_kd on a few drawn pictures and a tiny random teacher: its objective, its stages, its commands."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from llava_models import drawn_task, tiny_llava, tiny_processor
from recipe_runs import log_of, run_sh
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration, PreTrainedTokenizerFast

sys.path.append(str(ROOT / "recipes/llava_kd"))  # behind the others: its train.py is loaded by path

import evaluate_answers
import store_states
from visual_objective import LossConfig, count_items, loss_terms
from visual_students import DecoderConfig, StudentConfig, TowerConfig, new_student

from speechkd.data.conversations import load_image, read_conversations
from speechkd.data.visual_sequences import SequenceFormat, collate, encode, predicting
from speechkd.estimate import load_recipe
from speechkd.labels.teacher_cache import LabelStoreError
from speechkd.losses.logits import cross_entropy, forward_kl
from speechkd.losses.relation import rdist
from speechkd.models.llava import decoder_states, image_processor, num_visual_tokens, save_llava, visual_tokens

RECIPE = ROOT / "recipes/llava_kd"
YAMLS = sorted(RECIPE.glob("*.yaml"))
SHAPES = RECIPE / "shapes_vqa.yaml"
FULL = LossConfig(labels=1.0, response=1.0, visual=1.0, relation=0.5)
train = load_recipe(RECIPE / "train.py")


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    return drawn_task(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    model = tiny_llava(width=32, seed=7)
    save_llava(model, tiny_processor(model), folder)
    return str(folder)


def make_batch(task, count=3, texts=0):
    model = tiny_llava()
    form = SequenceFormat(processor=tiny_processor(model), num_visual_tokens=num_visual_tokens(model), independent=True)
    rows = read_conversations(task / "train.jsonl")
    turns = [{"from": "human", "value": "how many objects ?"}, {"from": "gpt", "value": "2"}]
    text = {"id": "text", "image": None, "kinds": None, "conversation": turns}
    items = [encode(rows[index], form) for index in range(count)] + [encode(text, form)] * texts
    return collate(items, form=form)


def test_the_objective_equals_plain_losses_on_logits(task):
    student, teacher, batch = tiny_llava(), tiny_llava(width=32, seed=7), make_batch(task, texts=1)
    total, terms = loss_terms(student, teacher, batch, weights=FULL)
    ours, theirs = (model.lm_head(decoder_states(model, batch).last) for model in (student, teacher))
    mask = batch["labels"][:, 1:] != -100
    num_tokens = mask.sum(dim=1)[:3]
    visual = [logits[batch["visual"]].view(3, 9, -1) for logits in (ours, theirs)]
    expected = {
        "labels": cross_entropy(ours[:, :-1], batch["labels"][:, 1:], reduction="sum"),
        "response": forward_kl(ours[:, :-1], theirs[:, :-1], mask, reduction="sum"),
        "visual": (forward_kl(*visual, reduction="none").mean(dim=1) * num_tokens).sum(),
        "relation": (rdist(*visual, reduction="none") * num_tokens).sum(),
    }
    assert set(terms) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach(), rtol=1e-4, atol=1e-5)
    weighted = sum(getattr(FULL, name) * value for name, value in expected.items())
    torch.testing.assert_close(total, weighted, rtol=1e-4, atol=1e-5)
    assert count_items(batch).item() == mask.sum().item() == predicting(batch["labels"]).sum().item()
    total.backward()
    assert all(weight.grad is None for weight in teacher.parameters())


def test_a_batch_is_the_sum_of_its_parts(task):
    student, teacher = tiny_llava(), tiny_llava(width=32, seed=7)
    whole = loss_terms(student, teacher, make_batch(task), weights=FULL)[0]
    rows = read_conversations(task / "train.jsonl")
    form = SequenceFormat(processor=tiny_processor(student), num_visual_tokens=9, independent=True)
    parts = [collate([encode(rows[index], form)], form=form) for index in range(3)]
    torch.testing.assert_close(sum(loss_terms(student, teacher, part, weights=FULL)[0] for part in parts), whole)


@pytest.mark.parametrize("source", ["last_hidden", "projector"])
def test_relations_of_other_sources(task, source):
    student, teacher, batch = tiny_llava(), tiny_llava(width=32, seed=7), make_batch(task)
    weights = LossConfig(relation=1.0, relation_source=source, relation_normalize=True)
    _, terms = loss_terms(student, teacher, batch, weights=weights)
    if source == "projector":
        vectors = [visual_tokens(model, batch["pixel_values"]) for model in (student, teacher)]
    else:
        vectors = [decoder_states(m, batch).last[batch["visual"]].view(3, 9, -1) for m in (student, teacher)]
    counts = (batch["labels"][:, 1:] != -100).sum(dim=1)
    expected = (rdist(*vectors, reduction="none", normalize=True) * counts).sum()
    torch.testing.assert_close(terms["relation"], expected.detach())


def test_the_teacher_itself_costs_nothing_but_labels(task):
    teacher, batch = tiny_llava(), make_batch(task)
    total, terms = loss_terms(tiny_llava(), teacher, batch, weights=FULL)
    assert max(terms[name].abs().item() for name in ("response", "visual", "relation")) < 1e-4
    torch.testing.assert_close(total.detach(), terms["labels"])


def test_text_alone_has_no_visual_loss_and_is_refused_where_nothing_could_learn(task):
    student, teacher, batch = tiny_llava(), tiny_llava(width=32, seed=7), make_batch(task, count=0, texts=2)
    total, terms = loss_terms(student, teacher, batch, weights=FULL)
    assert terms["visual"] == 0 == terms["relation"] and total.isfinite() and terms["response"] > 0
    with pytest.raises(ValueError, match=r"a batch has no picture \(text, text\), and this stage"):
        loss_terms(student, teacher, batch, weights=FULL, needs_picture=True)


def test_impossible_weights_are_refused():
    for wrong in ({"labels": 0.0}, {"visual": -1.0}):
        with pytest.raises(ValueError, match="loss weights must be 0 or more and not all 0"):
            LossConfig(**wrong)


def arguments(path: Path, task: Path, teacher: str, run: Path, *more: str) -> list[str]:
    """Options that make a configuration small: two steps a stage, the drawn pictures, the tiny teacher."""
    values = yaml.safe_load(path.read_text())
    stages = []
    for stage in values["stages"]:
        manifest = Path(stage.get("train_manifest", "train.jsonl")).name
        stages.append({**stage, "max_steps": 2, "train_manifest": str(task / manifest)})
    options = {
        "data.train_manifest": task / "train.jsonl",
        "data.test_manifest": task / "test.jsonl",
        "data.comp_manifest": task / "comp.jsonl",
        "data.batch_size": 4,
        "student.tokenizer": task / "tokenizer",
        "trainer.output_dir": run,
        "trainer.save_steps": 1,
        "trainer.logging_steps": 1,
        "trainer.bf16": "false",
        "trainer.use_cpu": "true",
        "stages": json.dumps(stages),
    }
    if values.get("teacher"):
        options |= {"teacher.name": teacher, "data.labels_dir": run.parent / "states"}
    return ["--config", str(path), *[f"--{key}={value}" for key, value in options.items()], *more]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.recipe
@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_recipe_trains_two_steps_a_stage_and_is_scored(path, task, teacher, tmp_path):
    run = tmp_path / "run"
    argv = arguments(path, task, teacher, run)
    if yaml.safe_load(path.read_text()).get("teacher"):
        store_states.main(argv)
    train.main(argv)
    evaluate_answers.main(argv)
    stages = [stage["name"] for stage in yaml.safe_load(path.read_text())["stages"]]
    starts = [json.loads((run / name / "run.json").read_text())["start"] for name in stages]
    assert starts == [None, *[str(run / name / "student") for name in stages[:-1]]]
    assert isinstance(LlavaForConditionalGeneration.from_pretrained(run / "student"), LlavaForConditionalGeneration)
    last = weights_of(run / stages[-1] / "student")
    assert all(weight.equal(last[name]) for name, weight in weights_of(run / "student").items())
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["test"]) > {"all"} and 0 <= metrics["test"]["all"] <= 100 and "comp" in metrics


@pytest.mark.recipe
def test_a_stored_teacher_gives_the_loss_of_the_live_one(task, teacher, tmp_path):
    logs = []
    for stored in ("true", "false"):
        argv = arguments(SHAPES, task, teacher, tmp_path / f"stored-{stored}", f"--teacher.stored={stored}")
        if stored == "true":
            store_states.main(argv)
        train.main(argv)
        logs.append([log_of(tmp_path / f"stored-{stored}" / name) for name in ("dpt", "dft")])
    for ours, theirs in zip(*logs, strict=True):
        for before, after in zip(ours, theirs, strict=True):
            terms = {name: value for name, value in before.items() if name.startswith("loss/")}
            assert all(after[name] == pytest.approx(value, abs=1e-5, rel=1e-5) for name, value in terms.items())
    assert {"loss/labels", "loss/response", "loss/visual", "loss/relation"} <= set(logs[0][0][0])


@pytest.mark.recipe
def test_a_killed_run_carries_on_in_its_stage(task, teacher, tmp_path):
    run = tmp_path / "run"
    argv = arguments(SHAPES, task, teacher, run, "--teacher.stored=false")
    train.main(argv)
    expected = weights_of(run / "student")
    first = (run / "dpt/student/model.safetensors").stat().st_mtime_ns
    for name in ("sft/student", "sft/checkpoint-2", "dft", "student"):
        shutil.rmtree(run / name)
    (run / "sft/run.json").unlink()
    began = (run / "sft/checkpoint-1/model.safetensors").stat().st_mtime_ns
    train.main(argv)
    assert (run / "dpt/student/model.safetensors").stat().st_mtime_ns == first
    assert (run / "sft/checkpoint-1/model.safetensors").stat().st_mtime_ns == began  # it went on from there
    assert all(weight.equal(expected[name]) for name, weight in weights_of(run / "student").items())


@pytest.mark.recipe
def test_a_stage_trains_its_parts_alone(task, teacher, tmp_path):
    stages = [
        {"name": "all", "train": ["vision", "projector", "decoder"], "max_steps": 1, "learning_rate": 1e-3},
        {"name": "dpt", "train": ["projector"], "max_steps": 2, "learning_rate": 1e-3},
    ]
    stages[1]["loss"] = {"labels": 1.0, "response": 1.0, "visual": 1.0, "relation": 0.5}
    run = tmp_path / "run"
    more = (f"--stages={json.dumps(stages)}", "--teacher.stored=false")
    train.main(arguments(SHAPES, task, teacher, run, *more))
    before, after = weights_of(run / "all/student"), weights_of(run / "dpt/student")
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and all("multi_modal_projector" in name for name in moved)


def test_a_student_of_pretrained_parts(task, tmp_path):
    made = tiny_llava()
    made.model.vision_tower.save_pretrained(tmp_path / "tower")
    image_processor(36, mean=[0.5] * 3, std=[0.25] * 3).save_pretrained(tmp_path / "tower")
    decoder = LlamaForCausalLM(LlamaConfig.from_dict({**made.config.text_config.to_dict(), "vocab_size": 43}))
    decoder.save_pretrained(tmp_path / "decoder")
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", *"abcdefg"])}
    tokenizer = Tokenizer(WordLevel(words))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(tmp_path / "tokenizer")
    model, processor = new_student(
        StudentConfig(
            tokenizer=str(tmp_path / "tokenizer"),
            tower=TowerConfig(name=str(tmp_path / "tower")),
            decoder=DecoderConfig(name=str(tmp_path / "decoder")),
        )
    )
    assert processor.image_token_id == 9 == model.config.image_token_id and model.lm_head.weight.shape[0] == 43
    assert processor.tokenizer.pad_token == "<eos>" and list(processor.image_processor.image_std) == [0.25] * 3
    for name, weight in decoder.model.state_dict().items():
        assert model.model.language_model.state_dict()[name].equal(weight)
    for name, weight in made.model.vision_tower.state_dict().items():
        assert model.model.vision_tower.state_dict()[name].equal(weight)
    with pytest.raises(ValueError, match="image_size=36 is no multiple of patch_size=10"):
        TowerConfig(patch_size=10)


def test_what_a_stage_cannot_do_is_refused(task, teacher, tmp_path, capsys):
    def refused(path, *more):
        with pytest.raises(SystemExit):
            train.main(arguments(path, task, teacher, tmp_path / "run", *more))
        return capsys.readouterr().err

    assert "stage dpt has the loss 1 CE + 1 KL of answers" in refused(SHAPES, "--teacher=null")
    stage = {"name": "dft", "train": ["projector"], "max_steps": 1, "learning_rate": 1e-3}
    loss = {"relation": 1.0, "relation_source": "projector"}
    assert "projector, which is not stored" in refused(SHAPES, f"--stages={json.dumps([{**stage, 'loss': loss}])}")
    assert "different names, got ['dft', 'dft']" in refused(SHAPES, f"--stages={json.dumps([stage, stage])}")
    assert "leave out a stage that is not wanted" in refused(
        SHAPES, f"--stages={json.dumps([{**stage, 'max_steps': 0}])}"
    )


def test_states_of_another_teacher_or_other_sequences_are_refused(task, teacher, tmp_path):
    argv = arguments(SHAPES, task, teacher, tmp_path / "run")
    store_states.main(argv)
    with pytest.raises(LabelStoreError, match="other sequences: prompt was '{question}', now 'Q {question}'"):
        train.main([*argv, "--data.prompt=Q {question}"])
    other = tiny_llava(width=32, seed=8)
    save_llava(other, tiny_processor(other), tmp_path / "other")
    more = (f"--teacher.name={tmp_path / 'other'}", f"--trainer.output_dir={tmp_path / 'second'}")
    with pytest.raises(LabelStoreError, match="come from teacher .*, but this run has .*other"):
        train.main([*argv, *more])
    shard = next((tmp_path / "states/captions").glob("shard-*.jsonl"))
    shard.write_text("".join(shard.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(LabelStoreError, match="lacks 1 of 12 conversations, first 'train-00000'; finish storing them"):
        train.main([*argv, f"--trainer.output_dir={tmp_path / 'third'}"])


def test_a_student_of_another_vocabulary_is_refused(task, tmp_path):
    other = tiny_llava(vocab_size=50)
    save_llava(other, tiny_processor(other), tmp_path / "other")
    with pytest.raises(ValueError, match="the student has 44 tokens and the teacher 50"):
        store_states.main(arguments(SHAPES, task, str(tmp_path / "other"), tmp_path / "run"))


def test_teacher_forced_scores_are_those_of_greedy_generation(task):
    model = tiny_llava()
    rows = read_conversations(task / "train.jsonl")
    form = SequenceFormat(processor=tiny_processor(model), num_visual_tokens=9, independent=True)
    items = [encode(rows[index], form) for index in range(8)]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):  # far enough that some answers are right
        loss, _ = loss_terms(model, None, collate(items, form=form), weights=LossConfig())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    forced = [right for answers in evaluate_answers.right_answers(model, items, form) for right in answers]
    greedy = []
    for index in range(8):
        for start in range(0, 8, 2):
            question, answer = (turn["value"] for turn in rows[index]["conversation"][start : start + 2])
            text = question if start == 0 else f"<image>\n{question}"
            inputs = form.processor(images=load_image(rows[index]["image"]), text=text, return_tensors="pt")
            done = model.generate(**inputs, max_new_tokens=12, do_sample=False)
            said = form.processor.tokenizer.decode(done[0, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
            greedy.append(said.split("<eos>")[0].split() == answer.split() and "<eos>" in said)
    assert forced == greedy and 0 < sum(forced) < len(forced)


def test_wrong_pictures_and_questions_alone(task):
    model, rows = tiny_llava(), read_conversations(task / "train.jsonl")
    form = SequenceFormat(processor=tiny_processor(model), num_visual_tokens=9, independent=True)
    scores = evaluate_answers.score(model, rows, form, batch_size=5)
    assert set(scores) == {"all", *{kind for row in rows for kind in row["kinds"]}}
    assert set(evaluate_answers.score(model, rows, form, other_pictures=True)) == set(scores)
    assert evaluate_answers.question_prior(rows, rows) > 40  # each question's commonest answer, on itself


@pytest.mark.recipe
def test_run_sh_goes_from_pictures_to_scores(task, tmp_path):
    shutil.copytree(task, tmp_path / "data/shapes_vqa")
    stages = [{"name": "sft", "train": ["projector"], "max_steps": 1, "learning_rate": 1e-3}]
    stages.append({**stages[0], "name": "dft", "loss": {"visual": 1.0}})
    model = tiny_llava(width=32)
    save_llava(model, tiny_processor(model), tmp_path / "teacher")
    words = ["quickstart", "--stage", "3", f"--teacher.name={tmp_path / 'teacher'}", f"--stages={json.dumps(stages)}"]
    done = run_sh("llava_kd", tmp_path, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "exp/llava_kd/quickstart/metrics.json").is_file()
    again = run_sh("llava_kd", tmp_path, *words)
    assert again.returncode == 0 and "stage 5 (evaluate): finished before, skipped" in again.stdout
    wrong = run_sh("llava_kd", tmp_path, "coco")
    assert wrong.returncode == 2 and "there are: quickstart" in wrong.stderr
