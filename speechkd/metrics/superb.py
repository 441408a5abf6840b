"""One number for the ten tasks of SUPERB, and how much of a teacher a student keeps.

SUPERB, Yang et al. 2021, https://arxiv.org/abs/2105.01051.
"""

import math
from dataclasses import asdict, dataclass
from statistics import mean


@dataclass(frozen=True, kw_only=True)
class SuperbRow:
    """Scores of one encoder on the test sets, in percent, but for `qbe_mtwv`.

    Args:
        pr_per: phone error rate, LibriSpeech test-clean.
        asr_wer: word error rate without a language model, LibriSpeech test-clean.
        ks_accuracy: keywords, Speech Commands.
        qbe_mtwv: maximum term weighted value of query by example, QUESST 2014; at most 1.
        sid_accuracy: speakers, VoxCeleb1.
        sv_eer: equal error rate of speaker verification, VoxCeleb1.
        sd_der: diarisation error rate, Libri2Mix.
        ic_accuracy: intents, all of action, object and location right, Fluent Speech Commands.
        sf_f1: slot types, Audio SNIPS.
        sf_cer: character error rate of slot values, Audio SNIPS.
        er_accuracy: emotions, IEMOCAP, mean of five folds.

    Raises:
        ValueError: a score is NaN or infinite, or `qbe_mtwv` is above 1.
    """

    pr_per: float
    asr_wer: float
    ks_accuracy: float
    qbe_mtwv: float
    sid_accuracy: float
    sv_eer: float
    sd_der: float
    ic_accuracy: float
    sf_f1: float
    sf_cer: float
    er_accuracy: float

    def __post_init__(self) -> None:
        for name, score in asdict(self).items():
            if not math.isfinite(score):
                raise ValueError(f"{name} is {score}; a row of SUPERB needs all {len(asdict(self))} scores")
        if self.qbe_mtwv > 1:
            raise ValueError(
                f"qbe_mtwv={self.qbe_mtwv} is above 1, the best value; tables print it times 100, so give "
                f"{self.qbe_mtwv / 100:g}"
            )


TASKS = (
    ("pr_per",),
    ("asr_wer",),
    ("ks_accuracy",),
    ("qbe_mtwv",),
    ("sid_accuracy",),
    ("sv_eer",),
    ("sd_der",),
    ("ic_accuracy",),
    ("sf_f1", "sf_cer"),
    ("er_accuracy",),
)
ERROR_RATES = ("pr_per", "asr_wer", "sv_eer", "sd_der", "sf_cer")


def _row(*scores: float) -> SuperbRow:
    """A row in the order of the published tables, which is that of the fields."""
    return SuperbRow(**dict(zip(SuperbRow.__dataclass_fields__, scores, strict=True)))


# The ends of superb_s's scale, as the leaderboard set them: older values of log-mel features do not give its scores.
FBANK = _row(82.01, 23.18, 41.38, 0.0058, 20.06, 9.56, 10.05, 9.65, 69.64, 52.94, 48.24)
SOTA = _row(3.53, 3.62, 96.66, 0.0736, 90.33, 5.11, 5.62, 98.76, 89.81, 21.76, 67.62)
SYSTEMS = {
    "wav2vec 2.0 Base": _row(5.74, 6.43, 96.23, 0.0233, 75.18, 6.02, 6.08, 92.35, 88.30, 24.77, 63.43),
    "HuBERT Base": _row(5.41, 6.42, 96.30, 0.0736, 81.42, 5.11, 5.88, 98.34, 88.53, 25.20, 64.92),
    "WavLM Base+": _row(3.92, 5.59, 97.37, 0.0988, 89.42, 4.07, 3.50, 99.00, 90.58, 21.20, 68.65),
    "LightHuBERT small": _row(6.60, 8.33, 96.07, 0.0764, 69.70, 5.42, 5.85, 98.23, 87.58, 26.90, 64.12),
    "DistilHuBERT": _row(16.27, 13.37, 95.98, 0.0511, 73.54, 8.55, 6.19, 94.99, 82.57, 35.59, 63.02),
    "FitHuBERT": _row(13.32, 12.09, 96.27, 0.0489, 55.71, 8.00, 6.84, 91.25, 84.06, 32.46, 59.82),
    "DPHuBERT": _row(9.67, 10.47, 96.36, 0.0693, 76.83, 5.84, 5.92, 97.92, 86.86, 28.26, 63.16),
}


def superb_s(row: SuperbRow) -> float:
    """The leaderboard's score: 0 for log-mel features, 1000 for the best of each task when it was fixed.

    Each metric is placed between these two; the metrics of a task are averaged, then the ten tasks.

    Args:
        row: scores of the encoder.
    """
    return 1000 * mean(mean(_place(row, name) for name in names) for names in TASKS)


def superb_overall(row: SuperbRow) -> float:
    """The mean of all eleven metrics, 0 to 100: error rates as 100 less the rate, `qbe_mtwv` times 100.

    Args:
        row: scores of the encoder.
    """
    scores = asdict(row) | {name: 100 - getattr(row, name) for name in ERROR_RATES} | {"qbe_mtwv": 100 * row.qbe_mtwv}
    return mean(scores.values())


def retention(student: float, teacher: float, baseline: float) -> float:
    """How much of what a teacher adds to a baseline the student keeps, a fraction: 1 all of it, 0 none.

    Above 1 the student is better than the teacher, below 0 worse than the baseline. Error rates do as well as
    accuracies.

    Args:
        student: its score on a task.
        teacher: the teacher's, in the same unit.
        baseline: that of log-mel features with the same head.

    Raises:
        ValueError: a score is NaN or infinite, or teacher and baseline are equal.
    """
    if not all(math.isfinite(score) for score in (student, teacher, baseline)):
        raise ValueError(
            f"scores of student, teacher and baseline must be numbers, got {student}, {teacher}, {baseline}"
        )
    if teacher == baseline:
        raise ValueError(
            f"teacher and baseline both score {teacher}, so there is nothing to keep; leave the task out, or make it "
            "harder"
        )
    return (student - baseline) / (teacher - baseline)


def _place(row: SuperbRow, name: str) -> float:
    low, high = getattr(FBANK, name), getattr(SOTA, name)
    return (getattr(row, name) - low) / (high - low)
