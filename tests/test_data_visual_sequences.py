import pytest
import torch
from llava_models import IMAGE_TOKEN, drawn_task, tiny_llava, tiny_processor

from speechkd.data.conversations import ImageError, read_conversations
from speechkd.data.visual_sequences import (
    EncodedConversations,
    SequenceFormat,
    answer_spans,
    block_attention,
    block_positions,
    collate,
    encode,
    expand_image,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return drawn_task(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def rows(folder):
    return read_conversations(folder / "train.jsonl")


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_llava())


def make_form(processor, **options):
    return SequenceFormat(processor=processor, num_visual_tokens=9, **options)


def words(processor, ids):
    return processor.tokenizer.decode(ids).split()


def test_a_placeholder_becomes_visual_positions():
    ids, labels = torch.tensor([5, 6, IMAGE_TOKEN, 7, 8]), torch.tensor([-100, -100, -100, 7, 8])
    longer, longer_labels = expand_image(ids, labels, IMAGE_TOKEN, 4)
    assert len(longer) == len(ids) + 4 - 1
    assert (longer == IMAGE_TOKEN).nonzero()[:, 0].tolist() == [2, 3, 4, 5]  # p to p + N
    assert longer_labels.tolist() == [-100] * 6 + [7, 8]
    for wrong, count in (([5, 6], 0), ([IMAGE_TOKEN, 5, IMAGE_TOKEN], 2)):
        with pytest.raises(ValueError, match=f"needs one <image> token, this one has {count}"):
            expand_image(torch.tensor(wrong), torch.tensor(wrong), IMAGE_TOKEN, 4)


@pytest.mark.parametrize("independent", [False, True])
def test_answers_and_their_ends_are_labelled(rows, processor, independent):
    item = encode(rows[0], make_form(processor, independent=independent))
    answers = [turn["value"] for turn in rows[0]["conversation"][1::2]]
    spans = answer_spans(item["labels"])
    said = [words(processor, item["labels"][start:end]) for start, end in spans]
    assert said == [[*answer.split(), "<eos>"] for answer in answers]
    assert torch.equal(item["labels"][item["labels"] >= 0], item["input_ids"][item["labels"] >= 0])
    assert item["input_ids"][:9].tolist() == [IMAGE_TOKEN] * 9 and (item["labels"][:9] == -100).all()
    assert item["pixels"].shape == (3, 36, 36) and item["kinds"] == rows[0]["kinds"]
    assert item["blocks"][:9].eq(0).all() and item["blocks"].unique().tolist() == (
        [0, 1, 2, 3, 4] if independent else [0]
    )


def test_every_question_is_in_the_prompt(rows, processor):
    for independent in (False, True):
        form = make_form(processor, prompt="a {question} is", independent=independent)
        item = encode(rows[0], form)
        question = rows[0]["conversation"][2]["value"].split()
        text = words(processor, item["input_ids"])
        assert text[0] == "a" and text[1:10] == ["<image>"] * 9
        middle = " ".join(text)
        assert ("<eos> " + ("" if independent else "a ") + " ".join(question) + " is") in middle
    with pytest.raises(ValueError, match="prompt='ask' must have {question} once"):
        make_form(processor, prompt="ask")


def test_blocks_see_the_prefix_and_themselves():
    blocks = torch.tensor([[0, 0, 1, 1, 2, -1]])
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
    ]
    seen = block_attention(blocks)
    assert seen.shape == (1, 1, 6, 6) and seen[0, 0, :5].int().tolist() == expected
    assert seen[0, 0, 5, 5]  # a row that sees nothing would be NaN
    assert block_positions(blocks)[0, :5].tolist() == [0, 1, 2, 3, 2]


def test_a_batch_is_padded_on_the_right(rows, processor):
    form = make_form(processor)
    text = {"id": "t", "image": None, "kinds": None}
    text["conversation"] = [{"from": "human", "value": "how many objects ?"}, {"from": "gpt", "value": "2"}]
    batch = collate([encode(rows[0], form), encode(text, form)], form=form)
    assert batch["ids"] == [rows.ids[0], "t"] and batch["pixel_values"].shape == (1, 3, 36, 36)
    assert batch["visual"].sum(dim=1).tolist() == [9, 0] and batch["attention_mask"][1].sum() == 6
    assert (batch["labels"][1, 6:] == -100).all() and (batch["input_ids"][1, 6:] == 0).all()
    assert batch["position_ids"][0].tolist() == list(range(batch["input_ids"].shape[1]))


def test_a_sequence_that_would_lose_its_picture_is_refused(rows, processor):
    short = encode(rows[0], make_form(processor, max_tokens=9))
    assert len(short["input_ids"]) == 9  # the picture alone fits
    with pytest.raises(
        ValueError, match=r"conversation 'train-00000': its picture takes tokens 0 to 9 of .* max_tokens=8"
    ):
        encode(rows[0], make_form(processor, max_tokens=8))


def test_a_picture_that_cannot_be_decoded_is_named(rows, processor, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ImageError, match="broken.png cannot be decoded"):
        encode({**rows[0], "image": str(tmp_path / "broken.png")}, make_form(processor))


def test_items_are_kept_in_memory_where_that_is_asked(rows, processor):
    for in_memory in (False, True):
        items = EncodedConversations(rows, make_form(processor), in_memory=in_memory)
        assert len(items) == 12 and (items[3] is items[3]) == in_memory


def test_the_ids_of_the_drawn_task_stay_the_same(rows, processor):
    items = EncodedConversations(rows, make_form(processor, independent=True))
    ids = torch.cat([items[index]["input_ids"] for index in range(len(items))])
    assert (len(ids), int((ids * torch.arange(1, len(ids) + 1)).sum() % 1_000_003)) == (501, 746_540)
