"""Scores of semantic parses such as `[IN:GET_WEATHER weather in [SL:LOCATION boston ] ]`; rates in percent.

STOP, Tomasello et al. 2022, https://arxiv.org/abs/2207.10643. Intents (IN) hold words and slots (SL), slots hold words
or an intent. The decoupled form, in which STOP is scored, keeps of the words only those of the innermost slots.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Union

TOKEN = re.compile(r"\[[^\s\[\]]*|\]|[^\s\[\]]+")  # an opening bracket with its label, a closing one, a word
MAX_DEPTH = 100  # real parses stay below 10; deeper ones would exhaust the stack when they are compared


@dataclass(frozen=True)
class Node:
    """A part of a parse.

    Args:
        label: "IN:<intent>" or "SL:<slot>".
        children: words and nodes in their order.
    """

    label: str
    children: tuple[Union["Node", str], ...] = ()


@dataclass(frozen=True)
class ParseScores:
    """How many parses are right, in percent.

    Args:
        exact_match: equal to the gold parse, words included.
        tree_match: equal in labels and structure, whatever the words (EM-Tree).
        intent_accuracy: with the right intent at the top.
        num_utterances: parses scored.
        num_broken: predictions that are no parse; wrong in all three.
    """

    exact_match: float
    tree_match: float
    intent_accuracy: float
    num_utterances: int
    num_broken: int


def parse(text: str) -> Node:
    """Read a parse; how much white space lies between its parts does not matter.

    Args:
        text: one intent in brackets.

    Returns:
        The tree.

    Raises:
        ValueError: brackets do not pair, a label is none, something stands outside the brackets, no intent is at the
            top, or brackets are nested more than 100 deep. The message gives the position, counted from 0.
    """
    root: Node | None = None
    opened: list[tuple[str, int, list[Node | str]]] = []
    for match in TOKEN.finditer(text):
        token, position = match[0], match.start()
        if root is not None:
            raise _error(text, position, f"{token!r} follows the end of the parse")
        if token == "]":
            if not opened:
                raise _error(text, position, "']' closes nothing")
            label, _, children = opened.pop()
            node = Node(label, tuple(children))
            if opened:
                opened[-1][2].append(node)
            else:
                root = node
        elif token.startswith("["):
            label = token[1:]
            if not re.fullmatch(r"(IN|SL):.+", label):
                raise _error(text, position, f"label {label!r} is neither IN:<intent> nor SL:<slot>")
            if not opened and not label.startswith("IN:"):
                raise _error(text, position, f"the parse begins with {label!r}, not with an intent")
            if len(opened) == MAX_DEPTH:
                raise _error(text, position, f"brackets are nested more than {MAX_DEPTH} deep")
            opened.append((label, position, []))
        elif opened:
            opened[-1][2].append(token)
        else:
            raise _error(text, position, f"word {token!r} stands before the first bracket")
    if opened:
        label, position, _ = opened[-1]
        raise _error(text, position, f"'[{label}' is never closed")
    if root is None:
        raise _error(text, 0, "there is no bracket")
    return root


def decouple(node: Node) -> Node:
    """The parse with words in innermost slots only (Aghajanyan et al. 2020, https://arxiv.org/abs/2009.13655).

    Args:
        node: a parse, decoupled or not.

    Returns:
        A tree of the same labels and structure.
    """
    nodes = tuple(decouple(child) for child in node.children if isinstance(child, Node))
    keeps_words = node.label.startswith("SL:") and not nodes
    return Node(node.label, node.children if keeps_words else nodes)


def without_words(node: Node) -> Node:
    """The parse's labels and structure alone."""
    return Node(node.label, tuple(without_words(child) for child in node.children if isinstance(child, Node)))


def top_intent(node: Node) -> str:
    """Name of the intent at the top, without "IN:"; the label of STOP as a classification task."""
    return node.label.removeprefix("IN:")


def parse_scores(gold: Sequence[str], predicted: Sequence[str]) -> ParseScores:
    """Score predicted parses. Words and the order of slots count as they are, white space does not.

    Args:
        gold: parses; for figures comparable with published ones in the decoupled form, STOP's column
            `decoupled_normalized_seqlogical`.
        predicted: parses of the same form, in the same order; one that is broken is wrong.

    Returns:
        Rates in percent.

    Raises:
        ValueError: lengths differ, there is no parse, or a gold parse is broken.
    """
    if len(gold) != len(predicted):
        raise ValueError(
            f"{len(gold)} gold parses and {len(predicted)} predictions differ in number; "
            "pass one prediction for every gold parse, in the same order"
        )
    if not gold:
        raise ValueError("there is no parse to score; check that the manifest holds gold parses")
    num_exact = num_tree = num_intent = num_broken = 0
    for index, (gold_text, text) in enumerate(zip(gold, predicted, strict=True)):
        try:
            right = parse(gold_text)
        except ValueError as error:
            raise ValueError(f"gold parse {index}: {error}; correct it or leave the utterance out") from error
        try:
            guess = parse(text)
        except ValueError:
            num_broken += 1
            continue
        num_exact += guess == right
        num_tree += without_words(guess) == without_words(right)
        num_intent += top_intent(guess) == top_intent(right)
    return ParseScores(
        exact_match=100 * num_exact / len(gold),
        tree_match=100 * num_tree / len(gold),
        intent_accuracy=100 * num_intent / len(gold),
        num_utterances=len(gold),
        num_broken=num_broken,
    )


def _error(text: str, position: int, problem: str) -> ValueError:
    around = text[max(0, position - 20) : position + 40]
    return ValueError(f"{problem}, at position {position} of the parse, near {around!r}")
