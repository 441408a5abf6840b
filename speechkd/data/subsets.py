"""Few items of each class, and the split of a corpus that comes without one, as SEGUE chooses them.

Tan et al. 2023, https://arxiv.org/abs/2305.12301.
"""

import random
from collections import Counter
from collections.abc import Sequence

SEGUE_SEEDS = (37, 38, 39)  # of its k-shot runs
SPLIT_SEED = 42


def k_shot_positions(ids: Sequence[str], classes: Sequence[str] | Sequence[int], k: int, seed: int) -> list[int]:
    """Draw k items of every class.

    Classes are taken in the order in which each is first seen, their items sorted by id, and one random generator
    draws for all. So the order of a class's items does not matter, that of the classes does.

    Args:
        ids: one name an item, none twice, (items,).
        classes: the class of each, (items,).
        k: items of each class.
        seed: SEGUE takes 37, 38 and 39.

    Returns:
        Positions in `ids`, k of each class, class after class.

    Raises:
        ValueError: lengths differ, there is no item, an item has no class, an id stands twice, k is below 1, or a
            class has fewer than k items.
    """
    if len(ids) != len(classes):
        raise ValueError(f"{len(ids)} ids and {len(classes)} classes differ in number; pass one class for every id")
    _check_ids(ids)
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}; leave the choice out to train on every item")
    unlabelled = [name for name, label in zip(ids, classes, strict=True) if label is None]
    if unlabelled:
        raise ValueError(f"{len(unlabelled)} of {len(ids)} items have no class, {unlabelled[0]!r} first; drop them")
    sizes: Counter[str | int] = Counter(classes)  # keeps the order in which classes are first seen
    small = {label: size for label, size in sizes.items() if size < k}
    if small:
        named = ", ".join(f"{label!r} has {size}" for label, size in sorted(small.items(), key=lambda item: item[1]))
        raise ValueError(
            f"k={k} is more than {len(small)} of {len(sizes)} classes hold: {named}; "
            f"take k={min(small.values())} or less, or leave those classes out"
        )
    members: dict[str | int, list[int]] = {label: [] for label in sizes}
    for position in sorted(range(len(ids)), key=lambda position: ids[position]):
        members[classes[position]].append(position)
    generator = random.Random(seed)
    return [position for of_class in members.values() for position in generator.sample(of_class, k)]


def minds14_split(ids: Sequence[str]) -> tuple[list[int], list[int], list[int]]:
    """SEGUE's split of a MInDS-14 locale, 60 % to train, 20 % dev, 20 % test.

    The corpus has no split and names no speaker: a speaker may be in two parts. Results compare with published ones
    only if the ids are in the order of the Hub's one split.

    Args:
        ids: one name an item, none twice, (items,).

    Returns:
        Positions in `ids` of train, dev and test, shuffled.

    Raises:
        ValueError: an id stands twice, or a part would be empty, as with 3 items or fewer.
    """
    _check_ids(ids)
    shuffled = random.Random(SPLIT_SEED).sample(range(len(ids)), k=len(ids))
    to_dev, to_test = round(0.6 * len(ids)), round(0.8 * len(ids))
    parts = shuffled[:to_dev], shuffled[to_dev:to_test], shuffled[to_test:]
    if not all(parts):
        raise ValueError(
            f"{len(ids)} items split into {len(parts[0])} for training, {len(parts[1])} dev and {len(parts[2])} test; "
            "each part needs one, give 4 items or more"
        )
    return parts


def _check_ids(ids: Sequence[str]) -> None:
    if not ids:
        raise ValueError("there is no item to choose from; check the manifest and its filters")
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(
            f"id {twice[0]!r} and {len(twice) - 1} more stand twice among {len(ids)} items; name each item once, or it "
            "may be in two parts"
        )
