import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from speechkd.losses.cross_tokenizer import gold
from speechkd.losses.token_alignment import align_ends, byte_ends, min_edit_alignment, shared_ids, token_bytes

TEXTS = ["naïve café", "नमस्ते दुनिया", "hello world 🙂👍", "the naïve world, 日本語"]


def byte_level_tokenizer(vocab_size):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.add_tokens(["<é>"])
    return tokenizer


def sentencepiece_tokenizer():
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [("▁", "w"), ("t", "h"), ("th", "e"), ("ï", "v"), ("न", "म"), ("l", "l")]
    pieces = ["<unk>", "</s>", *bytes_, *"▁abcdefhlnortvwéïनम", *("".join(pair) for pair in merges)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


SMALL, LARGE, PIECES = byte_level_tokenizer(270), byte_level_tokenizer(330), sentencepiece_tokenizer()
TOKENIZERS = {"small": SMALL, "large": LARGE, "pieces": PIECES}
SPELLED = {name: token_bytes(tokenizer) for name, tokenizer in TOKENIZERS.items()}
text_strategy = st.text(alphabet="abehlotwr naïvecafé,नमस्ते🙂👍日", min_size=1, max_size=20)


def encode(name, text):
    return TOKENIZERS[name](text, add_special_tokens=False)["input_ids"]


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, -100)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_spell_the_text_and_its_ends_reach_the_last_byte(name, text):
    ids = encode(name, text)
    spelled = b"".join(SPELLED[name][index] for index in ids)
    assert spelled.lstrip(b" ") == text.encode()
    ends = byte_ends(torch.tensor([ids]), SPELLED[name])[0].tolist()
    assert ends[-1] == len(text.encode()) and ends == sorted(ends)


@pytest.mark.parametrize("name, ends", [("small", [1, 2, 3, 4, 5]), ("pieces", [0, 1, 2, 3, 4, 5])])
def test_tokens_may_end_inside_a_character(name, ends):
    labels = torch.tensor([encode(name, "ß€")])  # neither was seen in training; pieces start with a space
    assert byte_ends(labels, SPELLED[name]).tolist() == [ends]


def test_special_and_unscored_tokens_have_no_end_and_spaces_before_the_first_word_no_bytes():
    spellings = [b"", b" ", b" a", b"bc", b"\xc3", b"\xa9"]
    labels = torch.tensor([[0, 1, 2, 2, 3, 0], [4, 5, 1, 3, 0, -100]])
    ends = byte_ends(labels, spellings)
    assert ends.dtype == torch.long
    assert ends.tolist() == [[-1, 0, 1, 3, 5, -1], [1, 2, 3, 5, -1, -1]]


def test_an_added_token_spells_itself_and_a_special_one_nothing():
    assert SPELLED["small"][SMALL.convert_tokens_to_ids("<é>")] == "<é>".encode()
    assert SPELLED["small"][SMALL.eos_token_id] == b"" and SPELLED["pieces"][PIECES.unk_token_id] == b""
    assert SPELLED["pieces"][PIECES.convert_tokens_to_ids("<0xE6>")] == b"\xe6"


def test_a_byte_level_vocabulary_may_hold_whole_characters():
    backend = Tokenizer(models.BPE({"日": 0, "Ġa": 1}, []))
    backend.decoder = decoders.ByteLevel()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend)) == ["日".encode(), b" a"]


def test_other_tokenizers_and_unknown_ids_are_refused():
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="decoder None, neither byte-level nor SentencePiece"):
        token_bytes(words)
    with pytest.raises(ValueError, match="id 2 is not among the 2 of its tokenizer"):
        byte_ends(torch.tensor([[0, 2]]), [b"a", b"b"])
    with pytest.raises(ValueError, match="id -1 is not among"):
        byte_ends(torch.tensor([[-1]]), [b"a"])


@pytest.mark.parametrize("names", [("small", "large"), ("large", "pieces"), ("pieces", "small")])
def test_shared_ids_are_all_tokens_that_spell_the_same(names):
    ours, theirs = (SPELLED[name] for name in names)
    pairs = shared_ids(ours, theirs).tolist()
    assert all(ours[a] == theirs[b] != b"" for a, b in pairs)
    assert {ours[a] for a, _ in pairs} == set(ours) & set(theirs) - {b""}
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs) > 250
    assert shared_ids([b"a"], [b"b"]).shape == (0, 2)


def test_of_ids_that_spell_the_same_the_last_is_shared():
    assert shared_ids([b"a", b"b", b"a"], [b"b", b"a"]).tolist() == [[1, 0], [2, 1]]


def test_alignment_closes_a_group_where_both_tokens_end():
    assert align_ends([3, 5, 9], [5, 7, 9]) == [([0, 1], [0]), ([2], [1, 2])]
    assert align_ends([0, 3], [3]) == [([0, 1], [0])]
    assert align_ends([-1, 3, -1, 5, -1], [3, 5]) == [([1], [0]), ([3], [1])]
    assert align_ends([], [3]) == [] and align_ends([3], []) == []


def test_leftovers_of_both_sides_are_a_last_group_and_of_one_side_none():
    assert align_ends([3, 6, 8], [3, 5]) == [([0], [0]), ([1, 2], [1])]
    assert align_ends([3, 6], [3]) == [([0], [0])]
    assert align_ends([3, 3], [3, 3]) == [([0], [0]), ([1], [1])]


def test_decreasing_ends_are_refused():
    with pytest.raises(ValueError, match=r"teacher token ends \[2, 1\] decrease"):
        align_ends([1, 2], [2, 1])
    with pytest.raises(ValueError, match=r"student token ends \[2, 1\] decrease"):
        align_ends([2, -1, 1], [2, 3])


@settings(max_examples=25, deadline=None)
@given(text_strategy, st.sampled_from([("small", "large"), ("large", "pieces"), ("pieces", "small")]))
def test_groups_of_two_tokenizers_spell_the_same_bytes(text, names):
    ids = [encode(name, text) for name in names]
    ends = [byte_ends(torch.tensor([row]), SPELLED[name])[0].tolist() for row, name in zip(ids, names, strict=True)]
    groups = align_ends(*ends)
    for n in range(2):
        assert sorted(k for group in groups for k in group[n]) == list(range(len(ids[n])))
    spelled = [[b"".join(SPELLED[names[n]][ids[n][k]] for k in group[n]) for group in groups] for n in range(2)]
    assert [b.lstrip(b" ") for b in spelled[0][:1]] == [b.lstrip(b" ") for b in spelled[1][:1]]
    assert spelled[0][1:] == spelled[1][1:]


def edit_distance_loop(a, b):
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            change = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            table[i, j] = min(change, table[i - 1, j] + 1, table[i, j - 1] + 1)
    return table[len(a), len(b)]


def best_cost(costs, i, j):
    """Cheapest warping path from (0, 0) to (i, j), by trying all of them."""
    if i == 0 and j == 0:
        return costs[0][0]
    steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
    return costs[i][j] + min(best_cost(costs, *step) for step in steps if min(step) >= 0)


@settings(max_examples=25, deadline=None)
@given(*[st.lists(st.binary(max_size=3), min_size=1, max_size=4) for _ in range(2)])
def test_minimum_edit_alignment_is_the_cheapest_path(ours, theirs):
    pairs = min_edit_alignment(ours, theirs)
    path = sorted((j, i) for i, row in enumerate(pairs) for j in row)
    assert path[0] == (0, 0) and path[-1] == (len(theirs) - 1, len(ours) - 1)
    assert all((b[0] - a[0], b[1] - a[1]) in {(1, 1), (1, 0), (0, 1)} for a, b in zip(path[:-1], path[1:], strict=True))
    plain = [[text.replace(b" ", b"") for text in tokens] for tokens in (ours, theirs)]
    costs = [[edit_distance_loop(a, b) for a in plain[0]] for b in plain[1]]
    assert sum(costs[j][i] for j, i in path) == best_cost(costs, len(theirs) - 1, len(ours) - 1)


def test_minimum_edit_alignment_pairs_equal_tokens_and_spreads_split_ones():
    ours, theirs = [b"the", b" book", b" cat", b"s"], [b"the", b" bo", b"ok", b" cat", b"s"]
    assert min_edit_alignment(ours, theirs) == [[0], [1, 2], [3], [4]]
    assert min_edit_alignment(theirs, ours) == [[0], [1], [1], [2], [3]]
    assert min_edit_alignment([b"ab"], []) == [[]] and min_edit_alignment([], [b"ab"]) == []


def test_gold_of_real_tokenizers_trains_the_student_towards_the_teacher():
    labels = {name: padded([encode(name, text) for text in TEXTS]) for name in ("small", "large")}
    case = {
        "student_labels": labels["small"],
        "teacher_labels": labels["large"],
        "student_ends": byte_ends(labels["small"], SPELLED["small"]),
        "teacher_ends": byte_ends(labels["large"], SPELLED["large"]),
        "shared": shared_ids(SPELLED["small"], SPELLED["large"]),
    }
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(*labels["large"].shape, len(SPELLED["large"]), generator=generator)
    student = torch.randn(*labels["small"].shape, len(SPELLED["small"]), generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.3)
    first = gold(student, teacher, **case)
    for _ in range(20):
        optimizer.zero_grad()
        loss = gold(student, teacher, **case)
        loss.backward()
        optimizer.step()
    assert loss < 0.7 * first
