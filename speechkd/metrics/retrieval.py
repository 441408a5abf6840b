"""How well the vectors of one kind, as of speech, find those of another, as of text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

CLIPS_AT_ONCE = 1024  # their cosines with 10,000 texts take 80 MB
COSINE_TIE = 1e-6  # cosines of single precision that are nearer than this are equal


def retrieval_scores(speech: ArrayLike, text: ArrayLike, texts: Sequence[str]) -> dict[str, Any]:
    """How well the vectors of clips find, by cosine, the vectors of what is said in them.

    The candidates are the different texts; clips of one text look for the same one. Where several candidates are
    equally near, a clip counts as one over their number, if its own is among them: an encoder that gives all clips one
    vector scores `chance`. A zero vector has cosine 0 with all.

    Args:
        speech: vectors of the clips, (clips, dim).
        text: the teacher's vectors of their texts, same shape.
        texts: what is said in each clip, (clips,).

    Returns:
        `top1`, share of clips whose own text is the nearest; `chance`, one over the candidates; `positive_cosine`, the
        mean cosine with the own text; `mse`, the mean squared difference; `num_clips`, `num_texts`.

    Raises:
        ValueError: shapes do not fit, there is no clip, or a value is NaN or infinite.
    """
    speech, text = np.asarray(speech, dtype=np.float64), np.asarray(text, dtype=np.float64)
    if speech.shape != text.shape or speech.ndim != 2 or not len(speech) or len(texts) != len(speech):
        raise ValueError(
            f"vectors of speech {speech.shape}, of text {text.shape} and {len(texts)} texts must be one each for every "
            "clip, of one width; give (clips, dim) twice and as many texts"
        )
    for name, vectors in (("clip", speech), ("text", text)):
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(broken):
            raise ValueError(
                f"the vector of {name} {broken[0]} and {len(broken) - 1} more of {len(vectors)} hold NaN or infinite "
                "values; look at these clips, or encode in float32"
            )
    first_clip: dict[str, int] = {}
    for clip, said in enumerate(texts):
        first_clip.setdefault(said, clip)
    number_of = {said: number for number, said in enumerate(first_clip)}
    own = np.array([number_of[said] for said in texts])
    unit_speech, unit_text = _unit_rows(speech), _unit_rows(text)
    candidates = unit_text[list(first_clip.values())]
    credit = 0.0
    for start in range(0, len(unit_speech), CLIPS_AT_ONCE):
        cosines = unit_speech[start : start + CLIPS_AT_ONCE] @ candidates.T
        nearest = cosines >= cosines.max(axis=1, keepdims=True) - COSINE_TIE
        found = nearest[np.arange(len(cosines)), own[start : start + CLIPS_AT_ONCE]]
        credit += float((found / nearest.sum(axis=1)).sum())
    return {
        "top1": credit / len(speech),
        "chance": 1 / len(first_clip),
        "positive_cosine": float((unit_speech * unit_text).sum(axis=1).mean()),
        "mse": float(np.square(speech - text).mean()),
        "num_clips": len(texts),
        "num_texts": len(first_clip),
    }


def _unit_rows(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)
