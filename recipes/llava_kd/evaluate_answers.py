"""Score a student by whole answers: all, by kind, with other pictures than asked about, and on pairs held out.

Launch: python recipes/llava_kd/evaluate_answers.py --config FILE [--section.key value ...], with the options of
train.py; writes `metrics.json` into the run folder. An answer is right when each of its tokens and its end is the
likeliest after the true ones before it, which is when greedy decoding gives it.
"""

import logging
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration
from visual_config import LlavaKdConfig, sequence_format

from speechkd.cli import run_command
from speechkd.config import parse_config
from speechkd.data.conversations import IMAGE_PLACEHOLDER, Conversations, read_conversations
from speechkd.data.visual_sequences import EncodedConversations, Item, SequenceFormat, answer_spans, collate
from speechkd.files import write_json
from speechkd.models.llava import decoder_states, load_llava

logger = logging.getLogger(__name__)

Score = dict[str, float]


@torch.no_grad()
def right_answers(model: LlavaForConditionalGeneration, items: list[Item], form: SequenceFormat) -> list[list[bool]]:
    """Whether each answer of each conversation is right.

    Args:
        model: in eval mode.
        items: of `encode`.
        form: of them.
    """
    device = next(model.parameters()).device
    batch = collate(items, form=form)
    batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    guesses = model.lm_head(decoder_states(model, batch).last).argmax(dim=-1)[:, :-1].cpu()
    labels = batch["labels"][:, 1:].cpu()
    return [
        [bool((guess[start:end] == label[start:end]).all()) for start, end in answer_spans(label)]
        for guess, label in zip(guesses, labels, strict=True)
    ]


def score(
    model: LlavaForConditionalGeneration,
    rows: Conversations,
    form: SequenceFormat,
    *,
    batch_size: int = 64,
    other_pictures: bool = False,
) -> Score:
    """Right answers in percent: `all`, and each kind.

    Args:
        model: in eval mode.
        rows: the manifest.
        form: of the sequences.
        batch_size: conversations at once.
        other_pictures: give each conversation the picture of the next; what is still right did not need it.
    """
    items = EncodedConversations(rows, form)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for start in range(0, len(rows), batch_size):
        indices = range(start, min(start + batch_size, len(rows)))
        batch = [items[index] for index in indices]
        if other_pictures:
            batch = [
                {**item, "pixels": items[(index + 1) % len(rows)]["pixels"]}
                for index, item in zip(indices, batch, strict=True)
            ]
        for item, answers in zip(batch, right_answers(model, batch, form), strict=True):
            for kind, is_right in zip(item["kinds"] or ["answer"] * len(answers), answers, strict=True):
                for name in ("all", kind):
                    asked[name] += 1
                    right[name] += is_right
    return {name: 100 * right[name] / asked[name] for name in asked}


def question_prior(train: Conversations, test: Conversations) -> float:
    """Right answers in percent of who has seen no picture: the commonest answer of training to the same question."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in _questions(train):
        answers[question][answer] += 1
    commonest = {question: counts.most_common(1)[0][0] for question, counts in answers.items()}
    asked = _questions(test)
    return 100 * sum(commonest.get(question) == answer for question, answer in asked) / len(asked)


def _questions(rows: Conversations) -> list[tuple[str, str]]:
    pairs = []
    for row in rows:
        values = [turn["value"].replace(IMAGE_PLACEHOLDER, "").strip() for turn in row["conversation"]]
        pairs += list(zip(values[::2], values[1::2], strict=True))
    return pairs


def main(argv: list[str] | None = None) -> None:
    config, _ = parse_config(LlavaKdConfig, argv)
    run_dir = Path(config.trainer.output_dir)
    started = time.process_time()
    model, processor = load_llava(str(run_dir / "student"))
    model.to(torch.device(config.trainer.device))
    form = sequence_format(config, model, processor)
    train, test = read_conversations(config.data.train_manifest), read_conversations(config.data.test_manifest)
    metrics: dict[str, Any] = {
        "model": str(run_dir / "student"),
        "parameters": model.num_parameters(),
        "test": score(model, test, form),
        "other_pictures": score(model, test, form, other_pictures=True)["all"],
        "question_prior": question_prior(train, test),
    }
    if config.data.comp_manifest is not None:
        comp = read_conversations(config.data.comp_manifest)
        metrics |= {"comp": score(model, comp, form), "comp_question_prior": question_prior(train, comp)}
    write_json(run_dir / "metrics.json", {**metrics, "cpu_seconds": time.process_time() - started})
    logger.info("%.1f %% of answers are right, %s", metrics["test"]["all"], run_dir / "metrics.json")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_command(main)
