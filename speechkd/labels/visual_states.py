"""A multimodal teacher's last states at visual positions and before answers, kept in the label store.

With the teacher's head they give all its logits there, and so the Gram matrices of its visual positions: width values a
token instead of as many as the vocabulary has.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from speechkd.data.conversations import Conversations
from speechkd.data.visual_sequences import EncodedConversations, Item, SequenceFormat, collate, predicting
from speechkd.files import folder_lock
from speechkd.labels.teacher_cache import LabelStore, LabelStoreError, check_teacher, create_store
from speechkd.models.llava import decoder_states
from speechkd.teachers import teacher_identity

logger = logging.getLogger(__name__)

TARGETS = ["visual_states"]
SHARD_BATCHES = 64


@torch.no_grad()
def store_visual_states(
    teacher: LlavaForConditionalGeneration,
    name: str,
    rows: Conversations,
    form: SequenceFormat,
    folder: str | Path,
    *,
    batch_size: int = 32,
) -> LabelStore:
    """Run a teacher over a manifest and keep what an objective compares; a killed run carries on.

    The array of a conversation is (visual tokens + answer tokens, width), in the teacher's dtype, visual ones first.

    Args:
        teacher: in eval mode.
        name: as the user gave it.
        rows: the manifest.
        form: of the sequences, the student's.
        folder: the store.
        batch_size: conversations at once.

    Raises:
        LabelStoreError: the folder holds states of another teacher or of other sequences.
        ValueError: as for `encode`.
    """
    device = next(teacher.parameters()).device
    header = {"teacher": teacher_identity(name, teacher), "targets": TARGETS, "decoding": form.describe()}
    with folder_lock(folder):
        store = create_store(folder, header)
        finished = {row["id"] for row in store.rows()}
        items = EncodedConversations(rows, form)
        missing = [index for index, row_id in enumerate(rows.ids) if row_id not in finished]
        made: dict[str, Tensor] = {}
        starts = range(0, len(missing), batch_size)
        for number, start in enumerate(tqdm(starts, desc="teacher states", unit="batch", disable=None), start=1):
            batch = collate([items[index] for index in missing[start : start + batch_size]], form=form)
            ids = batch["ids"]
            batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            states, before = decoder_states(teacher, batch).last, predicting(batch["labels"])
            for index, row_id in enumerate(ids):
                kept = torch.cat([states[index][batch["visual"][index]], states[index][before[index]]])
                made[row_id] = kept.cpu()
            if number % SHARD_BATCHES == 0 or number == len(starts):
                store.write_shard([{"id": row_id, "num_tokens": len(array)} for row_id, array in made.items()], made)
                made = {}
        logger.info("%s: %d conversations, %d of them new", folder, len(rows), len(missing))
    return LabelStore(folder)


def open_visual_states(
    folder: str | Path, identity: dict[str, Any], form: SequenceFormat, ids: list[str]
) -> LabelStore:
    """A finished store.

    Args:
        folder: the store.
        identity: of the teacher, see `teacher_identity`.
        form: of the sequences.
        ids: conversations that must be there.

    Raises:
        LabelStoreError: it is of another teacher or of other sequences, or lacks a conversation.
    """
    store = LabelStore(folder)
    check_teacher(store, identity)
    made_with, now = store.header["decoding"], form.describe()
    if made_with != now:
        changed = [
            f"{key} was {made_with.get(key)!r}, now {now[key]!r}" for key in now if made_with.get(key) != now[key]
        ]
        raise LabelStoreError(f"{folder} holds states of other sequences: {'; '.join(changed)}; store them again")
    missing = set(ids) - {row["id"] for row in store.rows()}
    if missing:
        raise LabelStoreError(
            f"{folder} lacks {len(missing)} of {len(ids)} conversations, first {min(missing)!r}; finish storing them"
        )
    return store


class WithTeacherStates(Dataset):
    """Sequences with the stored states of each as `teacher_states`.

    Args:
        items: the sequences.
        store: of the same conversations.
    """

    def __init__(self, items: EncodedConversations, store: LabelStore) -> None:
        self.items, self.store = items, store

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        item = self.items[index]
        return {**item, "teacher_states": self.store.array(item["id"])}


def collate_with_states(items: list[Item], *, form: SequenceFormat) -> dict[str, Any]:
    """`collate`, with `teacher_visual`, (images, visual tokens, width), and `teacher_response`, (answer tokens, width).

    Raises:
        LabelStoreError: a conversation has another number of stored states than of tokens.
    """
    batch = collate(items, form=form)
    before = predicting(batch["labels"]).sum(dim=1).tolist()
    visual, response = [], []
    for item, num_before in zip(items, before, strict=True):
        states: Tensor = item["teacher_states"]
        num_visual = 0 if item["pixels"] is None else form.num_visual_tokens
        if len(states) != num_visual + num_before:
            raise LabelStoreError(
                f"conversation {item['id']!r} has {len(states)} stored states for {num_visual} visual and {num_before} "
                "answer tokens; the manifest changed, store them again"
            )
        response.append(states[num_visual:])
        if num_visual:
            visual.append(states[:num_visual])
    batch["teacher_response"] = torch.cat(response)
    if visual:
        batch["teacher_visual"] = torch.stack(visual)
    return batch
