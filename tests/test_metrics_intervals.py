import numpy as np
import pytest

from speechkd.metrics.intervals import group_error_rates, macro_mean_wer, paired_difference, wer_interval


def make_corpus(num_utterances, seed):
    generator = np.random.default_rng(seed)
    words = generator.integers(1, 20, num_utterances)
    return generator.binomial(words, 0.15).tolist(), words.tolist()


def counts(substitutions, deletions, insertions, num_reference_words):
    return {
        "substitutions": substitutions,
        "deletions": deletions,
        "insertions": insertions,
        "num_reference_words": num_reference_words,
    }


def loop_rates(errors, words, num_resamples, seed):
    """The bootstrap as the definition reads: one draw after the other."""
    generator = np.random.default_rng(seed)
    rates = []
    for _ in range(num_resamples):
        drawn = [int(generator.integers(len(words))) for _ in words]
        rates.append(100 * sum(errors[i] for i in drawn) / sum(words[i] for i in drawn))
    return rates


def test_interval_equals_a_plain_loop_over_draws():
    # 700 resamples of 211 utterances need several blocks, the last of which is shorter
    errors, words = make_corpus(211, seed=1)
    rates = loop_rates(errors, words, 700, seed=5)
    expected = np.percentile(rates, [2.5, 97.5])
    assert wer_interval(errors, words, num_resamples=700, seed=5) == pytest.approx(tuple(expected), rel=1e-12)


def test_interval_is_the_same_for_the_same_seed_only():
    errors, words = make_corpus(50, seed=1)
    assert wer_interval(errors, words, seed=3) == wer_interval(errors, words, seed=3)
    assert wer_interval(errors, words, seed=3) != wer_interval(errors, words, seed=4)


def test_interval_agrees_with_the_standard_error_of_a_ratio():
    errors, words = make_corpus(4000, seed=2)
    wer = sum(errors) / sum(words)
    residuals = np.asarray(errors) - wer * np.asarray(words)
    standard_error = 100 * np.sqrt((residuals**2).sum()) / sum(words)
    low, high = wer_interval(errors, words, num_resamples=4000)
    assert low == pytest.approx(100 * wer - 1.96 * standard_error, abs=0.1 * standard_error)
    assert high == pytest.approx(100 * wer + 1.96 * standard_error, abs=0.1 * standard_error)


def test_interval_holds_the_true_rate_of_about_95_in_100_corpora():
    covered = 0
    for seed in range(300):
        low, high = wer_interval(*make_corpus(150, seed), num_resamples=400, seed=seed)
        covered += low <= 15 <= high
    assert 0.92 <= covered / 300 <= 0.98


def test_speakers_are_drawn_whole():
    errors, words = make_corpus(60, seed=3)
    speakers = [f"speaker-{index % 7}" for index in range(60)]
    expected = wer_interval(
        [sum(errors[index::7]) for index in range(7)], [sum(words[index::7]) for index in range(7)], seed=9
    )
    assert wer_interval(errors, words, units=speakers, seed=9) == expected
    shuffled = np.random.default_rng(0).permutation(60)
    again = [[column[i] for i in shuffled] for column in (errors, words, speakers)]
    assert wer_interval(again[0], again[1], units=again[2], seed=9) == expected


def test_interval_by_speaker_is_wider_where_speakers_differ():
    generator = np.random.default_rng(4)
    speakers = [f"speaker-{index // 40}" for index in range(800)]
    rates = np.repeat(generator.uniform(0, 0.4, 20), 40)
    words = generator.integers(5, 15, 800)
    errors = generator.binomial(words, rates)
    low, high = wer_interval(errors, words)
    by_speaker = wer_interval(errors, words, units=speakers)
    assert by_speaker[1] - by_speaker[0] > 2 * (high - low)


def test_paired_difference_equals_a_plain_loop_over_draws():
    baseline, words = make_corpus(90, seed=5)
    errors = [max(0, count - index % 3) for index, count in enumerate(baseline)]
    differences = [
        rate - baseline_rate
        for baseline_rate, rate in zip(
            loop_rates(baseline, words, 300, seed=2), loop_rates(errors, words, 300, seed=2), strict=True
        )
    ]
    paired = paired_difference(baseline, errors, words, num_resamples=300, seed=2)
    assert paired.wer_difference == pytest.approx(100 * (sum(errors) - sum(baseline)) / sum(words))
    assert (paired.low, paired.high) == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])))
    assert paired.probability_of_improvement == np.mean([difference < 0 for difference in differences]) == 1


def test_pairing_finds_a_difference_that_separate_intervals_hide():
    baseline, words = make_corpus(300, seed=6)
    errors = [count - (count > 0 and index % 8 == 0) for index, count in enumerate(baseline)]
    separate = wer_interval(baseline, words), wer_interval(errors, words)
    assert separate[0][0] < separate[1][1]  # they overlap
    paired = paired_difference(baseline, errors, words)
    assert paired.high < 0 and paired.probability_of_improvement > 0.99


def test_equal_systems_do_not_differ():
    errors, words = make_corpus(40, seed=7)
    paired = paired_difference(errors, errors, words)
    assert (paired.wer_difference, paired.low, paired.high, paired.probability_of_improvement) == (0, 0, 0, 0)


def test_swapping_the_systems_turns_the_sign():
    baseline, words = make_corpus(80, seed=8)
    errors, _ = make_corpus(80, seed=9)
    there, back = paired_difference(baseline, errors, words), paired_difference(errors, baseline, words)
    assert (there.wer_difference, there.low, there.high) == pytest.approx((-back.wer_difference, -back.high, -back.low))
    assert 0 < there.probability_of_improvement + back.probability_of_improvement <= 1


def test_what_cannot_be_drawn_from_is_refused():
    with pytest.raises(ValueError, match=r"of \[2, 3\] utterances differ in number"):
        wer_interval([1, 0, 0], [4, 5])
    with pytest.raises(ValueError, match=r"of \[1, 2\] utterances differ in number"):
        wer_interval([1, 0], [4, 5], units=["ann"])
    with pytest.raises(ValueError, match="utterance 1 of 3 has 0 reference words"):
        wer_interval([1, 2, 0], [4, 0, 5])
    with pytest.raises(ValueError, match="two or more utterances or units to draw from, got 1"):
        wer_interval([1, 0], [4, 5], units=["ann", "ann"])
    with pytest.raises(ValueError, match="two or more utterances or units to draw from, got 0"):
        wer_interval([], [])
    with pytest.raises(ValueError, match="num_resamples must be 1 or more, got 0"):
        wer_interval([1, 0], [4, 5], num_resamples=0)


# S, D, I, N of the two pairs of the method card: 1, 0, 2, 5 and 0, 1, 0, 3
CARD_COUNTS = [counts(1, 0, 2, 5), counts(0, 1, 0, 3)]


def test_group_rates_are_totals_and_only_the_macro_mean_is_a_mean():
    together = group_error_rates(CARD_COUNTS, ["en", "en"], num_resamples=0)
    assert together == {"en": {"wer": 50.0, **counts(1, 1, 2, 8), "num_utterances": 2}}
    apart = group_error_rates(CARD_COUNTS, ["ann", "bob"])
    assert {name: rates["wer"] for name, rates in apart.items()} == {"ann": 60.0, "bob": pytest.approx(100 / 3)}
    assert macro_mean_wer(apart) == pytest.approx(46.67, abs=0.01)
    assert macro_mean_wer(together) == 50.0


def test_a_group_has_the_interval_of_its_own_utterances_if_it_has_two():
    errors, words = make_corpus(30, seed=10)
    rows = [counts(count, 0, 0, num_words) for count, num_words in zip(errors, words, strict=True)]
    rates = group_error_rates(rows, ["ann"] * 29 + ["bob"], num_resamples=100, seed=3)
    expected = wer_interval(errors[:29], words[:29], num_resamples=100, seed=3)
    assert (rates["ann"]["wer_low"], rates["ann"]["wer_high"]) == expected
    assert "wer_low" not in rates["bob"] and rates["bob"]["num_utterances"] == 1


def test_utterances_without_group_or_reference_words_are_in_no_group():
    rates = group_error_rates([*CARD_COUNTS, counts(0, 0, 4, 0)], ["ann", None, "cy"])
    assert list(rates) == ["ann"]
    with pytest.raises(ValueError, match="no group has a scored utterance"):
        macro_mean_wer({})
    with pytest.raises(ValueError, match="2 utterances and 1 groups differ in number"):
        group_error_rates(CARD_COUNTS, ["ann"])
