"""Sections that the model cards of all students share; each recipe adds what its student is."""

from collections.abc import Sequence
from typing import Any


def card_head(run: dict[str, Any], pipeline_tag: str, tags: str, more: Sequence[str] = ()) -> list[str]:
    """The Hub's YAML header, and the title.

    Args:
        run: facts of the training, of `run.json`; the same in all functions here.
        pipeline_tag: the Hub's name of what the model is for.
        tags: further ones than those of all students, separated by commas.
        more: further lines of the header.
    """
    return [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {pipeline_tag}",
        f"license: {run['license'] or 'other'}",
        *more,
        f"tags: [speechkd, knowledge-distillation, {tags}]",
        "---",
        f"# {run['title']}",
        "",
    ]


def teacher_section(run: dict[str, Any], more: str = ".") -> list[str]:
    """Who was the teacher; `more` ends the sentence."""
    teacher = run["teacher"]
    return ["## Teacher", "", f"{teacher['name']}, weights SHA-256 `{teacher['weights_sha256']}`{more}", ""]


def data_section(run: dict[str, Any], more: str, student: str = "it") -> list[str]:
    """What it was trained on; `more` ends the sentence, `student` is what the warning of synthetic voices calls it."""
    warning = f"The voices are synthetic; nothing here says how {student} does on human speech."
    return [
        "## Data",
        "",
        f"{run['train_manifest']}: {run['train_utterances']} utterances, {run['train_hours']:.3f} h{more}",
        *([warning] if run["synthetic"] else []),
        "",
    ]


def training_section(run: dict[str, Any], steps: str = "steps", more: str = "") -> list[str]:
    """Loss, steps and settings; `more` are further settings, each with a comma behind it."""
    return [
        "## Training",
        "",
        f"Loss: {run['loss']}. {run['steps']} {steps}, learning rate {run['learning_rate']:g}, {more}seed "
        f"{run['seed']}, {run['device']}, {run['date']}.",
        "",
    ]


def licence_section(run: dict[str, Any], otherwise: str) -> list[str]:
    """The licence of the weights, or where it comes from."""
    return ["## Licence", "", run["license"] or otherwise, ""]
