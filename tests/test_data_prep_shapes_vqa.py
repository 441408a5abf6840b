import hashlib
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
import shapes_vqa
from shapes_vqa import TASKS, Shape, ask, draw_scene, prepare_shapes_vqa, words_of
from transformers import AutoTokenizer

from speechkd.data.conversations import load_image, read_conversations

SCENE = [Shape("red", "circle", 0, 2), Shape("blue", "square", 2, 0), Shape("blue", "circle", 1, 1)]


@pytest.fixture(scope="module", params=tuple(TASKS))
def corpus(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    prepare_shapes_vqa(folder, variant=request.param, num_train=60, num_test=20)
    return folder, TASKS[request.param]


def pairs_of(folder, split):
    """Kind, question and answer of every question of a split."""
    for row in read_conversations(folder / f"{split}.jsonl"):
        values = [turn["value"].removeprefix("<image>\n") for turn in row["conversation"]]
        yield from zip(row["kinds"], values[::2], values[1::2], strict=True)


def test_every_row_has_a_picture_four_questions_and_a_caption(corpus):
    folder, task = corpus
    assert [len(read_conversations(folder / f"{split}.jsonl")) for split in ("train", "test", "comp")] == [60, 20, 20]
    train, captions = (read_conversations(folder / f"{name}.jsonl") for name in ("train", "captions"))
    assert train.ids == captions.ids and captions[0]["image"] == train[0]["image"]
    assert all(len(row["conversation"]) == 8 for row in train) and load_image(train[0]["image"]).size == (36, 36)
    assert {kind for kind, _, _ in pairs_of(folder, "train")} == set(task.kinds)
    assert {question for _, question, _ in pairs_of(folder, "captions")} == {"describe ?"}


def test_the_tokenizer_knows_every_word_and_nothing_else(corpus):
    folder, task = corpus
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert len(tokenizer) == len(words_of(task)) + 3 and tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 1
    if task == TASKS["basic"]:
        assert len(tokenizer) == 44  # the card's 43 and the picture's
    for split in ("train", "captions", "test", "comp"):
        for _, question, answer in pairs_of(folder, split):
            text = f"<image>\n{question} {answer}"
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == 2 and tokenizer.decode(ids).split() == text.split()


def test_training_never_has_a_pair_that_is_held_out(corpus):
    folder, task = corpus
    text = " ".join(f"{q} {a}" for split in ("train", "captions", "test") for _, q, a in pairs_of(folder, split))
    assert not any(re.search(f"{color} {shape}s?", text) for color, shape in task.held_out)
    assert all(f"{color} {shape}" in text for color, shape in task.seen_pairs)


def test_the_compositional_split_asks_about_a_pair_that_is_held_out(corpus):
    folder, task = corpus
    held_out = [" ".join(pair) for pair in task.held_out]
    for kind, question, answer in pairs_of(folder, "comp"):
        assert kind != "exist"
        if kind in ("where", "relation"):
            assert any(name in question for name in held_out)
        if kind == "at":
            assert answer in held_out


def test_answers_are_true_of_the_scene():
    draw, seen = random.Random(0), Counter()
    task = TASKS["compositional"]
    names = {item.name: item for item in SCENE}
    for _ in range(100):
        for kind, question, answer in ask(SCENE, draw, task, held_out=False):
            seen[kind] += 1
            words = question.split()
            if kind == "color":
                assert (words[4], answer) == ("square", "blue")  # two circles
            elif kind == "shape":
                assert (words[4], answer) == ("red", "circle")  # two blue ones
            elif kind == "at":
                found = [item.name for item in SCENE if item.place == " ".join(words[3:5])]
                assert answer == (found[0] if found else "nothing")
            elif kind == "where":
                assert names[" ".join(words[3:5])].place == answer
            elif kind == "count":
                word = words[2]
                matches = [i for i in SCENE if word in ("objects", i.color, shapes_vqa.PLURALS[i.shape])]
                assert answer == str(len(matches))
            elif kind == "exist":
                assert answer == ("yes" if " ".join(words[3:5]) in names else "no")
            else:
                a, b = names[" ".join(words[2:4])], names[" ".join(words[-3:-1])]
                is_true = a.column < b.column if "left" in words else a.row < b.row
                assert answer == ("yes" if is_true else "no")
    assert set(seen) == set(task.kinds)


def test_the_same_seeds_give_the_same_files(tmp_path):
    digests = []
    for name in ("first", "second"):
        prepare_shapes_vqa(tmp_path / name, num_train=6, num_test=3)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        digests.append([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])
    assert digests[0] == digests[1]
    digest = hashlib.sha256((tmp_path / "first/train.jsonl").read_bytes()).hexdigest()
    assert digest == "b658e7ef2fde7e3b9fa28903cf479a2461388c79dfe9f2c7198ee8bc4b7c342c"


def test_a_picture_shows_its_objects():
    for item in SCENE:
        pixels = np.asarray(shapes_vqa.render([item], random.Random(0), np.random.default_rng(0))).astype(int)
        center = pixels[12 * item.row + 6, 12 * item.column + 6]
        assert center.argmax() == {"red": 0, "blue": 2}[item.color] and np.ptp(center) > 60
        assert np.ptp(pixels.mean(axis=2)[12 * ((item.row + 1) % 3) + 6]) < 70  # another row is grey and noise


def test_scenes_have_one_to_four_objects_in_cells_of_their_own():
    draw, sizes = random.Random(0), Counter()
    for _ in range(200):
        scene = draw_scene(draw, TASKS["basic"], held_out=False)
        assert len({(item.row, item.column) for item in scene}) == len(scene)
        sizes[len(scene)] += 1
    assert set(sizes) == {1, 2, 3, 4}


def test_impossible_numbers_and_variants_are_refused(tmp_path):
    with pytest.raises(ValueError, match="num_train and num_test must be 1 or more, got 0 and 3"):
        prepare_shapes_vqa(tmp_path, num_train=0, num_test=3)
    with pytest.raises(ValueError, match="variant must be one of basic, compositional, got 'hard'"):
        prepare_shapes_vqa(tmp_path, variant="hard")


def test_the_command_line(tmp_path, monkeypatch, capsys):
    argv = ["shapes_vqa.py", "--output-dir", str(tmp_path / "out"), "--num-train", "4", "--num-test", "2", "--json"]
    monkeypatch.setattr("sys.argv", argv)
    shapes_vqa.main()
    assert json.loads(capsys.readouterr().out) == {"train": 4, "test": 2, "comp": 2, "tokens": 44}
