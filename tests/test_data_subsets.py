import random

import pytest

from speechkd.data.subsets import SEGUE_SEEDS, k_shot_positions, minds14_split

IDS = [f"b{number}" for number in range(6)] + [f"a{number}" for number in range(6)]
CLASSES = ["b"] * 6 + ["a"] * 6


def chosen(ids, classes, k, seed):
    return [ids[position] for position in k_shot_positions(ids, classes, k, seed)]


def test_worked_example_of_two_shots():
    assert chosen(IDS, CLASSES, 2, 37) == ["b5", "b4", "a0", "a4"]


@pytest.mark.parametrize("seed", SEGUE_SEEDS)
@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_every_class_gives_k_different_items(k, seed):
    positions = k_shot_positions(IDS, CLASSES, k, seed)
    assert len(set(positions)) == 2 * k
    assert [CLASSES[position] for position in positions] == ["b"] * k + ["a"] * k


def test_order_of_items_within_a_class_does_not_matter():
    shuffled = list(zip(IDS, CLASSES, strict=True))
    random.Random(1).shuffle(shuffled)
    shuffled.sort(key=lambda item: item[1], reverse=True)  # b is still seen first
    ids, classes = zip(*shuffled, strict=True)
    assert list(ids) != IDS
    assert chosen(ids, classes, 2, 37) == chosen(IDS, CLASSES, 2, 37)


def test_classes_are_drawn_in_the_order_in_which_they_are_first_seen():
    # one generator for all: the draw of the second class goes on from that of the first
    assert chosen(IDS[::-1], CLASSES[::-1], 2, 37) == ["a5", "a4", "b0", "b4"]


def test_interleaved_classes_are_drawn_like_grouped_ones():
    ids = [name for pair in zip(IDS[:6], IDS[6:], strict=True) for name in pair]
    assert chosen(ids, [name[0] for name in ids], 2, 37) == ["b5", "b4", "a0", "a4"]


def test_seeds_choose_differently_and_alike_when_equal():
    choices = [tuple(k_shot_positions(IDS, CLASSES, 3, seed)) for seed in (*SEGUE_SEEDS, 37)]
    assert len(set(choices)) == 3
    assert choices[0] == choices[3]


def test_classes_may_be_numbers():
    numbers = [-3 if label == "b" else 2 for label in CLASSES]
    assert k_shot_positions(IDS, numbers, 2, 37) == k_shot_positions(IDS, CLASSES, 2, 37)


def test_classes_smaller_than_k_are_named_with_their_sizes():
    classes = ["tea"] * 6 + ["latte"] * 2 + ["mocha"] + ["cocoa"] * 3
    message = r"k=3 is more than 2 of 4 classes hold: 'mocha' has 1, 'latte' has 2; take k=1 or less"
    with pytest.raises(ValueError, match=message):
        k_shot_positions(IDS, classes, 3, 37)


@pytest.mark.parametrize(
    ("ids", "classes", "k", "message"),
    [
        (["x", "y"], ["a"], 1, "2 ids and 1 classes differ in number"),
        ([], [], 1, "there is no item to choose from"),
        (["x"], ["a"], 0, "k must be 1 or more, got 0"),
        (["x", "y", "z"], ["a", None, None], 1, "2 of 3 items have no class, 'y' first"),
        (["x", "y", "x"], ["a", "a", "a"], 1, "id 'x' and 0 more stand twice among 3 items"),
    ],
)
def test_items_that_cannot_be_drawn_from_are_refused(ids, classes, k, message):
    with pytest.raises(ValueError, match=message):
        k_shot_positions(ids, classes, k, 37)


def test_published_split_of_minds14():
    train, dev, test = minds14_split([str(number) for number in range(563)])
    assert (len(train), len(dev), len(test)) == (338, 112, 113)
    assert train[:5] == [114, 25, 281, 250, 228]
    assert dev[:3] == [254, 516, 361]
    assert test[:3] == [551, 377, 227]
    assert sorted(train + dev + test) == list(range(563))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_corpus_too_small_to_split_is_refused(count):
    with pytest.raises(ValueError, match=f"{count} items split into .* give 4 items or more"):
        minds14_split([str(number) for number in range(count)])


def test_four_items_fill_every_part():
    assert [len(part) for part in minds14_split(list("abcd"))] == [2, 1, 1]


def test_an_id_in_two_parts_is_refused():
    with pytest.raises(ValueError, match="id 'a' and 0 more stand twice"):
        minds14_split(list("abcdea"))
    with pytest.raises(ValueError, match="there is no item"):
        minds14_split([])
