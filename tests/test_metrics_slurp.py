import json
import logging

import pytest
from conftest import ROOT

from speechkd.cli import main
from speechkd.data.slurp import Frame, read_gold, read_predictions
from speechkd.metrics.slurp import (
    char_distance,
    count_entities,
    count_labels,
    count_near_entities,
    entity_counts,
    evaluate_slurp,
    macro_mean,
    score_frames,
    total,
    word_distance,
)

SLURP = ROOT.parent / "shared/data/slurp"
GOLD = SLURP / "dataset/slurp/test.jsonl"
needs_corpus = pytest.mark.skipif(not GOLD.is_file(), reason="no SLURP annotations beside the checkout")

# predictions, scenario, action, intent, exact, word, char, SLU, macro SLU, missing, scored
PUBLISHED = [
    ("gold_hermit", 0.9015, 0.8699, 0.8484, 0.7819, 0.8109, 0.8168, 0.8138, 0.6855, 0, 2974),
    ("gold_sfid", 0.8648, 0.8369, 0.8225, 0.6987, 0.7353, 0.7567, 0.7459, 0.5997, 0, 2974),
    ("multi_slurp_hermit", 0.8569, 0.8142, 0.7833, 0.6416, 0.6934, 0.7239, 0.7083, 0.5507, 7, 13071),
]
DISTANCES = [
    ("dance class", "dance glass", 0.5, 0.090909),
    ("dance class", "class", 0.5, 0.545455),
    ("eight", "eight a m", 2.0, 0.444444),
    ("new york", "new york city", 0.5, 0.384615),
    ("ten", "seven", 1, 0.6),
    ("five pm", "5 pm", 0.5, 0.571429),
    ("bob", "bob smith jones jr", 3.0, 0.833333),
    ("eight o'clock", "eight clock", 0.5, 0.153846),
    ("Dance Class", "dance class", 1, 0.181818),
    ("x", "", 1, 1),
]


def entities(*pairs):
    return [{"type": kind, "filler": filler} for kind, filler in pairs]


PERFECT = (entities(("event_name", "dance class")), entities(("event_name", "dance class")))
CASE_A = (
    entities(("event_name", "dance class"), ("time", "eight am")),
    entities(("event_name", "dance glass"), ("date", "eight am")),
)
CASE_B = (entities(("time", "eight"), ("time", "eight am")), entities(("time", "ate"), ("time", "eight")))
CASE_C = (entities(("person", "bob")), entities(("person", "bob"), ("person", "bob")))
CASE_D = (entities(("person", "bob")), entities(("person", "bob smith jones jr")))
CORPUS = [PERFECT, CASE_A, CASE_D, ([], entities(("date", "today")))]


def counts_of(*cases):
    return entity_counts([gold for gold, _ in cases], [predicted for _, predicted in cases])


def f1s(*cases):
    return {name: total(table).f1 for name, table in counts_of(*cases).items()}


def numbers(counts):
    return counts.true_positives, counts.false_positives, counts.false_negatives


def sentence(key=7, files=("a.flac",), scenario="calendar", action="set", words="Wake me At eight", spans=()):
    tokens = [{"surface": word, "id": index} for index, word in enumerate(words.split())]
    return {
        "slurp_id": key,
        "intent": "music",
        "scenario": scenario,
        "action": action,
        "tokens": tokens,
        "recordings": [{"file": file} for file in files],
        "entities": [{"type": kind, "span": span} for kind, span in spans],
    }


def prediction(file="a.flac", scenario="calendar", action="set", entities=()):
    return {"file": file, "scenario": scenario, "action": action, "entities": list(entities)}


@pytest.fixture
def write(tmp_path):
    def write_rows(name, *rows):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write_rows


@needs_corpus
@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
def test_published_predictions_score_as_with_the_official_scorer(row):
    name, *expected, num_missing, num_scored = row
    scores = evaluate_slurp(SLURP / f"predictions/{name}_predictions.jsonl", GOLD)
    keys = ["scenario_accuracy", "action_accuracy", "intent_accuracy", "entity_f1", "word_f1", "char_f1", "slu_f1"]
    assert [round(scores[key], 4) for key in [*keys, "macro_slu_f1"]] == expected
    assert (scores["num_missing"], scores["num_scored"], scores["num_unknown"]) == (num_missing, num_scored, 0)
    assert scores["coverage"] == num_scored / (num_scored + num_missing)


@needs_corpus
def test_counts_of_published_predictions_agree_to_all_digits():
    path = SLURP / "predictions/multi_slurp_hermit_predictions.jsonl"
    scores = evaluate_slurp(path, GOLD)
    assert scores["slu_precision"] == pytest.approx(0.7413322831, abs=5e-11)
    assert scores["slu_recall"] == pytest.approx(0.6781725811, abs=5e-11)
    assert scores["slu_f1"] == pytest.approx(0.7083473126, abs=5e-11)
    gold, predicted = read_gold(GOLD), read_predictions(path).frames
    tables = entity_counts([gold[key].entities for key in predicted], [frame.entities for frame in predicted.values()])
    assert numbers(total(tables["slu"])) == pytest.approx((17512, 6110.335623, 8310.335623), abs=5e-7)
    assert numbers(total(tables["entity"])) == (7278, 3516, 4616)


@needs_corpus
def test_annotations_give_a_frame_for_every_recording_or_sentence():
    by_file, by_sentence = read_gold(GOLD), read_gold(GOLD, "slurp_id")
    assert (len(by_file), len(by_sentence)) == (13078, 2974)
    assert sum(len(frame.entities) for frame in by_sentence.values()) == 2823
    assert len({frame.intent for frame in by_sentence.values()}) == 59


@pytest.mark.parametrize(("gold", "predicted", "word", "char"), DISTANCES)
def test_distances_are_those_of_the_official_scorer(gold, predicted, word, char):
    assert word_distance(gold, predicted) == word
    assert char_distance(gold, predicted) == pytest.approx(char, abs=5e-7)


def test_word_distance_to_a_gold_filler_without_words_is_refused():
    with pytest.raises(ValueError, match="gold filler ' ' holds no word"):
        word_distance(" ", "bob")


def test_wrong_type_is_a_miss_and_near_words_cost_their_distance():
    tables = counts_of(CASE_A)
    assert numbers(total(tables["entity"])) == (0, 2, 2)
    assert numbers(total(tables["word"])) == (1, 1.5, 1.5)
    assert numbers(total(tables["char"])) == pytest.approx((1, 1.090909, 1.090909), abs=5e-7)
    assert numbers(total(tables["slu"])) == pytest.approx((2, 2.590909, 2.590909), abs=5e-7)
    assert f1s(CASE_A) == pytest.approx({"entity": 0, "word": 0.4, "char": 0.478261, "slu": 0.435644}, abs=5e-7)
    assert macro_mean(tables["slu"])[2] == pytest.approx(0.257310, abs=5e-7)


def test_the_first_of_equally_near_entities_is_taken():
    tables = counts_of(CASE_B)
    assert numbers(total(tables["word"])) == (2, 1.5, 1.5)
    expected = {"entity": 0.5, "word": 0.571429, "char": 0.695652, "slu": 0.627451}
    assert f1s(CASE_B) == pytest.approx(expected, abs=5e-7)


def test_order_of_predictions_changes_near_matches_but_no_exact_ones():
    gold, predicted = CASE_B
    expected = {"entity": 0.5, "word": 0.666667, "char": 0.695652, "slu": 0.680851}
    assert f1s((gold, predicted[::-1])) == pytest.approx(expected, abs=5e-7)


def test_an_entity_predicted_twice_is_right_once():
    for table in counts_of(CASE_C).values():
        counts = total(table)
        assert (counts.precision, counts.recall, counts.f1) == (0.5, 1.0, pytest.approx(0.666667, abs=5e-7))


def test_word_distance_above_one_costs_more_than_a_miss():
    assert numbers(total(counts_of(CASE_D)["word"])) == (1, 3, 3)
    scores = f1s(CASE_D)
    assert scores["word"] == 0.25
    assert (scores["char"], scores["slu"]) == pytest.approx((0.545455, 0.342857), abs=5e-7)


def test_scores_of_a_corpus_sum_the_counts_of_its_utterances():
    tables = counts_of(*CORPUS)
    expected = {
        "entity": (0.2, 0.25, 0.222222),
        "word": (0.352941, 0.4, 0.375),
        "char": (0.506394, 0.609231, 0.553073),
        "slu": (0.415966, 0.482927, 0.446953),
    }
    for name, values in expected.items():
        counts = total(tables[name])
        assert (counts.precision, counts.recall, counts.f1) == pytest.approx(values, abs=5e-7)
    assert numbers(total(tables["slu"])) == pytest.approx((6, 8.424242, 6.424242), abs=5e-7)
    assert macro_mean(tables["slu"])[2] == pytest.approx(0.303536, abs=5e-7)
    shuffled = counts_of(*CORPUS[::-1])
    assert {name: numbers(total(table)) for name, table in shuffled.items()} == {
        name: pytest.approx(numbers(total(table))) for name, table in tables.items()
    }


def test_exact_hits_are_at_most_the_near_ones():
    for case in (PERFECT, CASE_A, CASE_B, CASE_C, CASE_D):
        tables = counts_of(case)
        assert total(tables["entity"]).true_positives <= total(tables["word"]).true_positives


@pytest.mark.parametrize("case", [PERFECT, CASE_A, CASE_B, CASE_C, CASE_D])
def test_an_unrelated_prediction_never_raises_precision(case):
    gold, predicted = case
    more = counts_of((gold, [*predicted, *entities(("color_type", "red"))]))
    for name, table in counts_of(case).items():
        assert total(more[name]).precision <= total(table).precision


def test_upper_case_in_a_predicted_filler_lowers_every_entity_score():
    scores = f1s((entities(("person", "bob")), entities(("person", "Bob"))))
    assert scores["entity"] == 0 and all(scores[name] < 1 for name in ("word", "char", "slu"))


def test_an_entity_with_further_keys_is_a_near_match_only():
    guess = [{"type": "person", "filler": "bob", "confidence": "0.9"}]
    assert numbers(total(count_entities([entities(("person", "bob"))], [guess]))) == (0, 1, 1)
    assert numbers(total(count_near_entities([entities(("person", "bob"))], [guess], char_distance))) == (1, 0, 0)


def test_micro_scores_of_labels_are_the_accuracy_and_macro_f1_is_a_mean_of_f1():
    counts = count_labels(list("aabcc"), list("abbac"))
    together = total(counts)
    assert together.precision == together.recall == 0.6
    assert together.f1 == pytest.approx(0.6)
    assert macro_mean(counts) == pytest.approx((0.666667, 0.666667, 0.611111), abs=5e-7)


def test_no_entity_anywhere_scores_0_and_divides_by_nothing():
    scores = score_frames({"a": Frame("qa", "maths")}, {"a": Frame("qa", "maths")})
    assert scores["slu_f1"] == scores["macro_slu_f1"] == scores["entity_precision"] == 0
    assert scores["intent_accuracy"] == scores["coverage"] == 1


def test_lists_of_different_length_are_refused():
    for count in (count_labels, count_entities, entity_counts):
        with pytest.raises(ValueError, match="1 gold items and 2 predictions differ in number"):
            count(["a"], ["a", "b"])


def test_perfect_predictions_score_1_in_everything():
    frames = {"a": Frame("calendar", "set", CASE_A[0]), "b": Frame("qa", "maths"), "c": Frame("qa", "stock")}
    scores = score_frames(frames, dict(reversed(frames.items())))
    assert {key: value for key, value in scores.items() if value != 1} == {"num_scored": 3, "num_missing": 0}


def test_intent_is_right_only_if_scenario_and_action_are():
    gold = {key: Frame("play", "music") for key in "abc"}
    predicted = {"a": Frame("play", "music"), "b": Frame("play", "radio"), "c": Frame("iot", "music")}
    scores = score_frames(gold, predicted)
    assert scores["scenario_accuracy"] == scores["action_accuracy"] == 2 / 3
    assert scores["intent_accuracy"] == 1 / 3


def test_only_utterances_of_both_sides_count_and_coverage_says_so():
    gold = {key: Frame("play", "music", CASE_D[0]) for key in "abcd"}
    scores = score_frames(gold, {"a": gold["a"], "x": Frame("qa", "maths", CASE_D[0])})
    assert (scores["slu_f1"], scores["num_missing"], scores["num_scored"], scores["coverage"]) == (1, 3, 1, 0.25)
    with pytest.raises(ValueError, match="none of 1 predictions is of one of 4 utterances"):
        score_frames(gold, {"x": gold["a"]})


def test_gold_makes_intents_of_scenario_and_action_and_fillers_of_lower_case_tokens(write):
    path = write("gold.jsonl", sentence(files=("a.flac", "b.flac", "audio--1.flac"), spans=[("time", [2, 3])]))
    frames = read_gold(path)
    assert list(frames) == ["a.flac", "b.flac", "audio--1.flac"]
    assert all(frame.intent == "calendar_set" for frame in frames.values())
    assert frames["b.flac"].entities == entities(("time", "at eight"))
    assert list(read_gold(path, "slurp_id")) == ["7"]


def test_all_broken_gold_lines_are_named_at_once(write):
    lacks_tokens = {key: value for key, value in sentence().items() if key != "tokens"}
    path = write(
        "gold.jsonl",
        sentence(),
        lacks_tokens,
        sentence(spans=[("time", [9])]),
        sentence(spans=[("time", [])]),
        sentence(scenario=None),
        "[]",
    )
    with pytest.raises(ValueError, match="5 broken line") as error:
        read_gold(path)
    for text in (":2: not an annotated sentence (KeyError: 'tokens')", ":3:", ":4:", ":5:", ":6: holds list"):
        assert f"gold.jsonl{text}" in str(error.value)


def test_ids_of_predictions_are_files_or_sentences_as_the_first_line_says(write):
    by_sentence = {**prediction(), "slurp_id": "7"}
    del by_sentence["file"]
    number = {**by_sentence, "slurp_id": 8}
    read = read_predictions(write("sentences.jsonl", by_sentence, number))
    assert (read.id_key, list(read.frames)) == ("slurp_id", ["7", "8"])
    assert read_predictions(write("files.jsonl", {**prediction(), "slurp_id": "7"})).id_key == "file"
    with pytest.raises(ValueError, match="mixed.jsonl:2: file is missing"):
        read_predictions(write("mixed.jsonl", prediction(), by_sentence))


def test_sentence_ids_are_matched_with_the_numbers_of_the_gold_file(write):
    gold = write("gold.jsonl", sentence(key=7, files=("a.flac", "b.flac")))
    row = {"slurp_id": "7", "scenario": "calendar", "action": "set", "entities": []}
    scores = evaluate_slurp(write("predictions.jsonl", row), gold)
    assert (scores["num_scored"], scores["num_missing"], scores["ids"]) == (1, 0, "slurp_id")


def test_all_broken_predictions_are_named_at_once_with_their_lines(write):
    empty, no_action = prediction(entities=entities(("time", " "))), prediction()
    del no_action["action"]
    path = write(
        "predictions.jsonl",
        prediction(),
        "",
        empty,
        no_action,
        '{"file": ',
        prediction(entities=["bob"]),
        {**prediction(), "entities": None},
        prediction(entities=[{"type": "time", "filler": float("nan")}]),
        "7",
    )
    with pytest.raises(ValueError, match="7 broken line") as error:
        read_predictions(path)
    for text in (
        ":3: entity 1: filler is empty; leave the entity out",
        ":4: action is missing, not a text",
        ":5: not JSON",
        ":6: entity 1 is str, not a JSON object",
        ":7: entities is None, not a list",
        ":8: entity 1: filler is nan, not a text",
        ":9: holds int, not a JSON object",
    ):
        assert f"predictions.jsonl{text}" in str(error.value)


def test_many_broken_lines_are_counted_and_the_first_ones_shown(write):
    with pytest.raises(ValueError, match="30 broken line") as error:
        read_predictions(write("predictions.jsonl", *["?"] * 30))
    assert "predictions.jsonl:20:" in str(error.value) and "predictions.jsonl:21:" not in str(error.value)
    assert "and 10 more" in str(error.value)


def test_empty_and_missing_files_are_refused(write, tmp_path):
    with pytest.raises(ValueError, match="holds no prediction"):
        read_predictions(write("empty.jsonl"))
    with pytest.raises(ValueError, match="holds no annotated sentence"):
        read_gold(write("empty.jsonl"))
    with pytest.raises(ValueError, match="absent.jsonl does not exist"):
        read_predictions(tmp_path / "absent.jsonl")


def test_later_predictions_of_an_id_replace_earlier_ones(write):
    path = write("predictions.jsonl", prediction(scenario="qa"), prediction(), prediction(file="b.flac"))
    read = read_predictions(path)
    assert read.num_duplicates == 1 and read.frames["a.flac"].scenario == "calendar"


def test_unknown_ids_are_counted_and_named_in_a_warning(write, caplog):
    gold = write("gold.jsonl", sentence(files=("a.flac", "b.flac")))
    path = write("predictions.jsonl", prediction(), prediction(file="x.flac", scenario="qa"))
    with caplog.at_level(logging.WARNING):
        scores = evaluate_slurp(path, gold)
    assert (scores["num_unknown"], scores["num_missing"], scores["scenario_accuracy"]) == (1, 1, 1)
    assert "1 predictions, 'x.flac'" in caplog.text and "1 utterances of 2, 'b.flac'" in caplog.text


def test_predictions_of_which_no_id_is_known_are_refused(write):
    gold = write("gold.jsonl", sentence())
    with pytest.raises(ValueError, match="none of the 2 ids .* the first is 'x.flac', there it is 'a.flac'"):
        evaluate_slurp(write("predictions.jsonl", prediction(file="x.flac"), prediction(file="y.flac")), gold)


def test_command_prints_the_scores_and_writes_them_where_asked(write, tmp_path, capsys):
    gold = write("gold.jsonl", sentence(spans=[("time", [3])]))
    path = write("predictions.jsonl", prediction(entities=entities(("time", "eight"))))
    arguments = ["evaluate", "--task", "slurp", "--predictions", str(path), "--gold", str(gold), "--json"]
    main(arguments)
    scores = json.loads(capsys.readouterr().out)
    keys = "scenario_accuracy action_accuracy intent_accuracy entity_f1 word_f1 char_f1 slu_f1 macro_slu_f1".split()
    assert [scores[key] for key in keys] == [1.0] * 8 and scores["num_missing"] == 0
    assert not list(tmp_path.rglob("metrics.json"))
    main([*arguments, "--output-dir", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == scores == json.loads(capsys.readouterr().out)
