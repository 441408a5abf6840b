import json

import pytest
from PIL import Image

from speechkd.data.conversations import ImageError, load_image, read_conversations
from speechkd.data.manifest import ManifestError, write_manifest


def turn(speaker, value):
    return {"from": speaker, "value": value}


def row(name="a", question="<image>\nwhat ?", answer="that", **more):
    return {"id": name, "image": "a.png", "conversation": [turn("human", question), turn("gpt", answer)], **more}


@pytest.fixture
def write(tmp_path):
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "a.png")

    def write_rows(*rows):
        write_manifest(tmp_path / "rows.jsonl", rows)
        return tmp_path / "rows.jsonl"

    return write_rows


def test_rows_come_back_with_absolute_pictures(write, tmp_path):
    text_alone = {"id": "b", "conversation": [turn("human", "2 + 2 ?"), turn("gpt", "4")]}
    rows = read_conversations(write(row(kinds=["what"]), text_alone))
    assert rows.ids == ["a", "b"] and rows[0]["image"] == str(tmp_path / "a.png") and rows[1]["image"] is None
    assert rows[0]["kinds"] == ["what"] and rows[1]["kinds"] is None
    assert [turn["value"] for turn in rows[1]["conversation"]] == ["2 + 2 ?", "4"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (row(question="what ?"), "'a' has an image and 0 <image>, 0 of them in its first turn; it needs one, there"),
        (row(question="<image> <image>"), "'a' has an image and 2 <image>, 2 of them"),
        (row(question="what ?", answer="<image>"), "'a' has an image and 1 <image>, 0 of them"),
        ({**row(), "image": None}, "'a' has 1 <image> and no image; name its picture or remove them"),
        (row(image="b.png"), "image file .*b.png does not exist"),
        (row(conversation=[]), r"has conversation=\[\]; it must be a list of turns with the texts from and value"),
        (row(conversation=[turn("human", "<image>")]), r"has turns of \['human'\]; they must be human, gpt"),
        (row(conversation=[turn("gpt", "<image>"), turn("human", "a")]), r"has turns of \['gpt', 'human'\]"),
        (row(kinds=["a", "b"]), r"kinds=\['a', 'b'\]; there must be one text for each of 1 answers"),
        (row(audio="a.wav"), "unknown field 'audio'; known are id, image, conversation, kinds"),
        (row(name=""), "has id=''; it must be text"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(write, broken, message):
    with pytest.raises(ManifestError, match=f"rows.jsonl:1: conversation .*{message}"):
        read_conversations(write(broken))


def test_all_problems_are_reported_at_once(write, tmp_path):
    path = write(row(), row(), row("c", question="none"))
    path.write_text(path.read_text() + "not json\n")
    with pytest.raises(ManifestError) as error:
        read_conversations(path)
    message = str(error.value)
    assert message.startswith("3 problem(s)") and "rows.jsonl:2: repeats the id of line 1" in message
    assert "rows.jsonl:3: conversation 'c'" in message and "rows.jsonl:4: not JSON" in message


def test_an_empty_and_a_missing_manifest_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ManifestError, match="holds no conversation"):
        read_conversations(tmp_path / "empty.jsonl")
    with pytest.raises(ManifestError, match="does not exist"):
        read_conversations(tmp_path / "no.jsonl")


def test_pictures_are_decoded_as_rgb_and_broken_ones_are_named(write, tmp_path):
    write(row())
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (9, 9, 9)
    Image.new("L", (8, 8), 7).save(tmp_path / "grey.png")
    assert load_image(tmp_path / "grey.png").getpixel((0, 0)) == (7, 7, 7)
    whole = (tmp_path / "grey.png").read_bytes()
    for name, content in (
        ("truncated.png", whole[: len(whole) // 2]),
        ("text.png", json.dumps({}).encode()),
        ("empty.png", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=f"image .*{name} cannot be decoded .*copy it again"):
            load_image(tmp_path / name)
    with pytest.raises(ImageError, match="no.png cannot be decoded"):
        load_image(tmp_path / "no.png")
