"""What the tokens of two tokenizers spell and which of them belong together; the losses are in `cross_tokenizer`."""

import math
import re
from collections.abc import Sequence

import torch
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from speechkd.losses.contract import IGNORE_INDEX

NO_TEXT = -1  # the byte end of a token that spells nothing, or is not scored


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """What every id of a tokenizer spells, in UTF-8; b"" for special tokens and ids without a token.

    For byte-level BPE (Whisper, GPT-2, Qwen) and SentencePiece vocabularies with or without byte fallback (Llama, T5).
    A token may end inside a character. Set an entry to b"" where a token stands for no text, such as a timestamp of
    Whisper's that its tokenizer does not call special. Takes a moment for a large vocabulary: call it once.

    Raises:
        ValueError: the tokenizer is of another kind.
    """
    decoder = repr(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None))
    byte_level = "ByteLevel" in decoder
    if not byte_level and "▁" not in decoder:
        raise ValueError(
            f"{type(tokenizer).__name__} has the decoder {decoder}, neither byte-level nor SentencePiece; list what "
            "each id spells yourself"
        )
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    added = tokenizer.added_tokens_decoder
    special = {index for index, token in added.items() if token.special}.union(tokenizer.all_special_ids)
    vocabulary = tokenizer.get_vocab()
    table = [b""] * (max(vocabulary.values()) + 1)
    for piece, index in vocabulary.items():
        if index in special:
            continue
        if index in added:
            table[index] = piece.encode()
        elif byte_level and byte_of.keys() >= set(piece):
            table[index] = bytes(byte_of[character] for character in piece)
        elif byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            table[index] = bytes.fromhex(byte[1])
        else:
            table[index] = piece.replace("▁", " ").encode()
    return table


def spell(spellings: Sequence[bytes], ids: list[int]) -> list[bytes]:
    """What the ids spell; b"" for -100.

    Raises:
        ValueError: an id is not in the list.
    """
    for index in ids:
        if index != IGNORE_INDEX and not 0 <= index < len(spellings):
            raise ValueError(
                f"id {index} is not among the {len(spellings)} of its tokenizer; tokens that are not scored have "
                f"{IGNORE_INDEX}"
            )
    return [b"" if index == IGNORE_INDEX else spellings[index] for index in ids]


def byte_ends(labels: Tensor, spellings: Sequence[bytes]) -> Tensor:
    """Where each token ends in the text that its sequence spells, in bytes; -1 where it spells nothing.

    Tokenizers differ in whether they put a space before the first word; such spaces are not counted.

    Args:
        labels: token ids, (batch, length), with -100 on tokens that are not scored.
        spellings: what each id spells, from `token_bytes`.

    Returns:
        (batch, length), int64.

    Raises:
        ValueError: an id is not in the list.
    """
    rows = []
    for row in labels.tolist():
        ends, end = [], 0
        for text in spell(spellings, row):
            end += len(text if end else text.lstrip(b" "))
            ends.append(end if text else NO_TEXT)
        rows.append(ends)
    return torch.tensor(rows, dtype=torch.long, device=labels.device).view(labels.shape)


def shared_ids(student_bytes: Sequence[bytes], teacher_bytes: Sequence[bytes]) -> Tensor:
    """Student and teacher id of the tokens that spell the same, (pairs, 2), int64; each id at most once.

    TRL compares the vocabularies' own strings, which parts "Ġthe" from "▁the" and "Ã©" from "é", and keeps special
    tokens. Where several ids spell the same, such as a character and its byte fallback, the last one counts.

    Args:
        student_bytes: what each id spells, from `token_bytes`.
        teacher_bytes: the teacher's.
    """
    ours = {text: index for index, text in enumerate(student_bytes) if text}
    theirs = {text: index for index, text in enumerate(teacher_bytes) if text}
    pairs = [(ours[text], index) for text, index in theirs.items() if text in ours]
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2)


def align_ends(student_ends: Sequence[int], teacher_ends: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest groups of tokens that end at the same byte in both sequences: positions in each.

    Ends of 3, 5, 9 and 5, 7, 9 give ([0, 1], [0]) and ([2], [1, 2]). Tokens with negative ends are left out. Where the
    texts end differently, what remains on both sides is one more group, as in TRL.

    Raises:
        ValueError: ends decrease.
    """
    student = [position for position, end in enumerate(student_ends) if end >= 0]
    teacher = [position for position, end in enumerate(teacher_ends) if end >= 0]
    _check_order("student", [student_ends[position] for position in student])
    _check_order("teacher", [teacher_ends[position] for position in teacher])
    groups = []
    ours = theirs = first_ours = first_theirs = 0
    while ours < len(student) and theirs < len(teacher):
        our_end, their_end = student_ends[student[ours]], teacher_ends[teacher[theirs]]
        ours += our_end <= their_end
        theirs += their_end <= our_end
        if our_end == their_end:
            groups.append((student[first_ours:ours], teacher[first_theirs:theirs]))
            first_ours, first_theirs = ours, theirs
    groups.append((student[first_ours:], teacher[first_theirs:]))
    return [group for group in groups if group[0] and group[1]]


def min_edit_alignment(student_tokens: Sequence[bytes], teacher_tokens: Sequence[bytes]) -> list[list[int]]:
    """Teacher positions that dynamic time warping pairs with each student token, as many lists as student tokens.

    MinED, Wan et al. 2024 (FuseLLM), https://arxiv.org/abs/2401.10491. A pair costs the edit distance of its bytes
    without spaces. Of equally good last steps it takes the one in both sequences, then the one in the teacher's, as
    DSKD's code does.
    """
    if not student_tokens or not teacher_tokens:
        return [[] for _ in student_tokens]
    ours, theirs = ([text.replace(b" ", b"") for text in tokens] for tokens in (student_tokens, teacher_tokens))
    total = [[0.0] + [math.inf] * len(ours)]
    for costs in cdist(theirs, ours, scorer=Levenshtein.distance).tolist():
        row = [math.inf]
        for column, cost in enumerate(costs):
            row.append(cost + min(total[-1][column], total[-1][column + 1], row[column]))
        total.append(row)
    pairs: list[list[int]] = [[] for _ in ours]
    i, j = len(theirs), len(ours)
    while i and j:
        pairs[j - 1].insert(0, i - 1)
        i, j = min((i - 1, j - 1), (i - 1, j), (i, j - 1), key=lambda step: total[step[0]][step[1]])
    return pairs


def _check_order(name: str, ends: list[int]) -> None:
    if ends != sorted(ends):
        raise ValueError(f"{name} token ends {ends} decrease; they count bytes from the start of one text")
