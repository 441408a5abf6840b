import math
from dataclasses import asdict, fields, replace

import pytest

from speechkd.metrics.superb import (
    ERROR_RATES,
    FBANK,
    SOTA,
    SYSTEMS,
    TASKS,
    SuperbRow,
    retention,
    superb_overall,
    superb_s,
)

# superb_s and Overall as printed by the leaderboard and the papers
PUBLISHED = {
    "wav2vec 2.0 Base": (818, None),
    "HuBERT Base": (941, 80.8),
    "WavLM Base+": (1106, None),
    "LightHuBERT small": (901, 79.1),
    "DistilHuBERT": (717, 75.9),
    "FitHuBERT": (685, 74.5),
    "DPHuBERT": (866, 78.9),
}


def test_ends_of_the_scale():
    assert superb_s(FBANK) == 0
    assert superb_s(SOTA) == pytest.approx(1000)


def test_worked_examples():
    assert superb_s(SYSTEMS["DPHuBERT"]) == pytest.approx(866.2, abs=0.05)
    assert superb_s(SYSTEMS["DistilHuBERT"]) == pytest.approx(717.3, abs=0.05)
    assert superb_overall(SYSTEMS["DPHuBERT"]) == pytest.approx(78.90, abs=0.005)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_reference_row_gives_its_published_scores(name):
    score, overall = PUBLISHED[name]
    assert round(superb_s(SYSTEMS[name])) == score
    assert overall is None or superb_overall(SYSTEMS[name]) == pytest.approx(overall, abs=0.05)


def test_each_of_ten_tasks_weighs_a_tenth():
    for names in TASKS:
        solved = replace(FBANK, **{name: getattr(SOTA, name) for name in names})
        assert superb_s(solved) == pytest.approx(100)
    assert superb_s(replace(FBANK, sf_cer=SOTA.sf_cer)) == pytest.approx(50)
    assert sorted(name for names in TASKS for name in names) == sorted(field.name for field in fields(SuperbRow))


def test_a_better_value_of_any_metric_raises_both_scores():
    row = SYSTEMS["DistilHuBERT"]
    for name, value in asdict(row).items():
        better = replace(row, **{name: value * (0.9 if name in ERROR_RATES else 1.01)})
        assert superb_s(better) > superb_s(row)
        assert superb_overall(better) > superb_overall(row)


def test_overall_of_a_perfect_encoder_is_100():
    names = [field.name for field in fields(SuperbRow)]
    perfect = SuperbRow(**{name: 0.0 if name in ERROR_RATES else 100.0 for name in names} | {"qbe_mtwv": 1.0})
    assert superb_overall(perfect) == 100


def test_retention_of_accuracies_and_of_error_rates():
    assert retention(90.0, 95.0, 45.0) == pytest.approx(0.9)
    assert retention(8.0, 5.0, 35.0) == pytest.approx(0.9)
    assert [retention(score, 0.8, 0.4) for score in (0.8, 0.4)] == [1, 0]
    assert retention(0.3, 0.8, 0.4) < 0 < 1 < retention(0.9, 0.8, 0.4)


def test_scores_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="er_accuracy is nan; a row of SUPERB needs all 11 scores"):
        replace(FBANK, er_accuracy=math.nan)
    with pytest.raises(ValueError, match=r"qbe_mtwv=7.36 is above 1, .* so give 0.0736"):
        replace(FBANK, qbe_mtwv=7.36)
    with pytest.raises(ValueError, match="teacher and baseline both score 0.5, so there is nothing to keep"):
        retention(0.6, 0.5, 0.5)
    with pytest.raises(ValueError, match="must be numbers, got nan, 0.5, 0.4"):
        retention(math.nan, 0.5, 0.4)
