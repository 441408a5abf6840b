"""Conversations about pictures as token sequences: visual positions, labels, and questions that do not see each other.

A picture's placeholder becomes as many image tokens as it has visual tokens, whose embeddings the model replaces by the
projector's output. Labels are -100 there, in questions and on padding.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from speechkd.data.conversations import IMAGE_PLACEHOLDER, Conversations, load_image
from speechkd.losses.contract import IGNORE_INDEX

Item = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SequenceFormat:
    """How conversations become sequences.

    Args:
        processor: tokenizer and image processor of the models; the tokenizer knows `<image>` as one token.
        num_visual_tokens: of a picture.
        prompt: a question's text, with {question}; the answer and the end token follow.
        independent: each question sees the picture and itself alone, so that one sequence stands for as many as it has
            questions; False is a dialogue, in which each question sees all before it.
        max_tokens: longest sequence; the rest is cut off.

    Raises:
        ValueError: the prompt has no {question}, or a number is below 1.
    """

    processor: LlavaProcessor
    num_visual_tokens: int
    prompt: str = "{question}"
    independent: bool = False
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.prompt.count("{question}") != 1:
            raise ValueError(f"prompt={self.prompt!r} must have {{question}} once")
        if self.num_visual_tokens < 1 or self.max_tokens < 1:
            raise ValueError(
                f"num_visual_tokens={self.num_visual_tokens} and max_tokens={self.max_tokens} must be 1 or more"
            )

    @property
    def image_token_id(self) -> int:
        return int(self.processor.image_token_id)

    def describe(self) -> dict[str, Any]:
        """What decides about the sequences, for the header of a label store."""
        names = ("num_visual_tokens", "prompt", "independent", "max_tokens")
        return {name: getattr(self, name) for name in names} | {"tokens": len(self.processor.tokenizer)}


def expand_image(ids: Tensor, labels: Tensor, image_token_id: int, num_visual_tokens: int) -> tuple[Tensor, Tensor]:
    """Make room for the visual tokens: the placeholder at index p becomes positions p to p + `num_visual_tokens`.

    Args:
        ids: (tokens,), int64.
        labels: (tokens,), int64.
        image_token_id: of the placeholder.
        num_visual_tokens: of a picture.

    Returns:
        Ids and labels, longer by `num_visual_tokens` - 1; labels at visual positions are -100.

    Raises:
        ValueError: there is not exactly one placeholder.
    """
    places = (ids == image_token_id).nonzero()[:, 0]
    if len(places) != 1:
        raise ValueError(f"a sequence with a picture needs one {IMAGE_PLACEHOLDER} token, this one has {len(places)}")
    place = int(places[0])

    def expand(values: Tensor, filling: int) -> Tensor:
        return torch.cat([values[:place], values.new_full((num_visual_tokens,), filling), values[place + 1 :]])

    return expand(ids, image_token_id), expand(labels, IGNORE_INDEX)


def encode(row: dict[str, Any], form: SequenceFormat) -> Item:
    """One conversation as a sequence.

    Args:
        row: of `read_conversations`.
        form: how.

    Returns:
        `id`, `kinds`, `input_ids`, `labels` and `blocks`, (tokens,), int64, and `pixels`, (3, side, side), float32, or
        None without a picture. A block is the number of the question from 1; all see block 0.

    Raises:
        ValueError: the picture would be cut off, or cannot be decoded.
    """
    tokenizer = form.processor.tokenizer
    has_image = row["image"] is not None
    values = [turn["value"] for turn in row["conversation"]]
    ids: list[int] = tokenizer("")["input_ids"]  # what the tokenizer begins a text with
    labels, blocks = [IGNORE_INDEX] * len(ids), [0] * len(ids)

    def add(text: str, block: int, *, is_answer: bool = False) -> None:
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        new = [*new, tokenizer.eos_token_id] if is_answer else new
        ids.extend(new)
        labels.extend(new if is_answer else [IGNORE_INDEX] * len(new))
        blocks.extend([block] * len(new))

    for number, (question, answer) in enumerate(zip(values[::2], values[1::2], strict=True), start=1):
        block = number if form.independent else 0
        if form.independent and has_image:
            # each as if it were the first; what comes before and with the picture is the same for all
            question = f"{IMAGE_PLACEHOLDER}\n{question.replace(IMAGE_PLACEHOLDER, '').strip()}"
        text = form.prompt.replace("{question}", question)
        if form.independent and has_image:
            before, _, text = text.partition(IMAGE_PLACEHOLDER)
            if number == 1:
                add(before + IMAGE_PLACEHOLDER, 0)
        add(text, block)
        add(answer, block, is_answer=True)
    return _finished(row, form, torch.tensor(ids), torch.tensor(labels), torch.tensor(blocks))


def _finished(row: dict[str, Any], form: SequenceFormat, ids: Tensor, labels: Tensor, blocks: Tensor) -> Item:
    """The item with its picture, whose visual tokens all fit."""
    pixels = None
    if row["image"] is not None:
        place = int((ids == form.image_token_id).int().argmax())
        blocks = torch.cat([blocks[:place], blocks.new_zeros(form.num_visual_tokens), blocks[place + 1 :]])
        ids, labels = expand_image(ids, labels, form.image_token_id, form.num_visual_tokens)
        if place + form.num_visual_tokens > form.max_tokens:
            raise ValueError(
                f"conversation {row['id']!r}: its picture takes tokens {place} to {place + form.num_visual_tokens} of "
                f"{len(ids)}, but max_tokens={form.max_tokens} would cut it off; raise it or shorten the text before"
            )
        processor: Any = form.processor.image_processor
        pixels = processor(images=load_image(row["image"]), return_tensors="pt")["pixel_values"][0]
    end = form.max_tokens
    sequence = {"input_ids": ids[:end], "labels": labels[:end], "blocks": blocks[:end]}
    return {"id": row["id"], "kinds": row["kinds"], **sequence, "pixels": pixels}


class EncodedConversations(Dataset):
    """Sequences of a manifest, one by one.

    Args:
        rows: the manifest.
        form: how conversations become sequences.
        in_memory: keep each once it is made, for small pictures.
    """

    def __init__(self, rows: Conversations, form: SequenceFormat, *, in_memory: bool = False) -> None:
        self.rows, self.form, self.in_memory = rows, form, in_memory
        self._made: dict[int, Item] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        if index in self._made:
            return self._made[index]
        item = encode(self.rows[index], self.form)
        if self.in_memory:
            self._made[index] = item
        return item


def collate(items: list[Item], *, form: SequenceFormat) -> dict[str, Any]:
    """Sequences padded on the right.

    Args:
        items: of `encode`; text alone may be among them.
        form: what they were made with.

    Returns:
        `ids` and `kinds`, lists; `input_ids`, `labels`, `position_ids`, (batch, tokens), int64; `visual`, True on
        visual positions, (batch, tokens), bool; `attention_mask`, (batch, tokens), int64, or, with independent
        questions, (batch, 1, tokens, tokens), bool; `pixel_values`, (images, 3, side, side), where there is a picture.
    """
    pad = form.processor.tokenizer.pad_token_id
    input_ids = pad_sequence([item["input_ids"] for item in items], batch_first=True, padding_value=pad or 0)
    labels = pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=IGNORE_INDEX)
    blocks = pad_sequence([item["blocks"] for item in items], batch_first=True, padding_value=-1)
    batch = {
        "ids": [item["id"] for item in items],
        "kinds": [item["kinds"] for item in items],
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": block_positions(blocks),
        "visual": (input_ids == form.image_token_id) & (blocks >= 0),
        "attention_mask": block_attention(blocks) if form.independent else (blocks >= 0).long(),
    }
    if pixels := [item["pixels"] for item in items if item["pixels"] is not None]:
        batch["pixel_values"] = torch.stack(pixels)
    return batch


def block_attention(blocks: Tensor) -> Tensor:
    """What each token sees: those before it of block 0 and of its own, (batch, 1, tokens, tokens), bool.

    Args:
        blocks: (batch, tokens), int64, -1 on padding, which sees itself.
    """
    tokens = torch.arange(blocks.shape[1], device=blocks.device)
    seen, seeing = blocks[:, None, :], blocks[:, :, None]
    return (((seen == 0) | (seen == seeing)) & (tokens <= tokens[:, None]))[:, None]


def block_positions(blocks: Tensor) -> Tensor:
    """Position of each token, (batch, tokens): every block begins where block 0 ends."""
    attended = block_attention(blocks)[:, 0].sum(dim=-1) - 1
    return attended.clamp(min=0)


def predicting(labels: Tensor) -> Tensor:
    """True on tokens that predict a label, (batch, tokens): the one before each."""
    return F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))


def answer_spans(labels: Tensor) -> list[tuple[int, int]]:
    """First token and end of each answer of a sequence, (tokens,): runs of labels."""
    scored = torch.cat([labels.new_zeros(1), (labels != IGNORE_INDEX).to(labels.dtype), labels.new_zeros(1)])
    change = scored.diff()
    starts, ends = ((change == sign).nonzero()[:, 0].tolist() for sign in (1, -1))
    return list(zip(starts, ends, strict=True))
