import pytest

from speechkd.metrics.semantic_parse import MAX_DEPTH, Node, decouple, parse, parse_scores, top_intent, without_words

COUPLED = "[IN:GET_WEATHER what is it like in [SL:LOCATION [IN:GET_LOCATION the big [SL:POINT apple ] ] ] today ]"
DECOUPLED = "[IN:GET_WEATHER [SL:LOCATION [IN:GET_LOCATION [SL:POINT apple ] ] ] ]"
GOLD = "[IN:CREATE_ALARM [SL:DATE_TIME at eight ] [SL:ALARM_NAME work ] ]"


def test_a_parse_becomes_a_tree_of_words_slots_and_intents_in_order():
    assert parse("[IN:PLAY play [SL:ARTIST daft punk ] now ]") == Node(
        "IN:PLAY", ("play", Node("SL:ARTIST", ("daft", "punk")), "now")
    )
    assert parse("[IN:STOP ]") == Node("IN:STOP")


def test_white_space_between_the_parts_does_not_matter():
    assert parse("[IN:PLAY[SL:ARTIST  daft\tpunk]]\n") == parse("[IN:PLAY [SL:ARTIST daft punk ] ]")


def test_decoupling_keeps_words_of_innermost_slots_only_and_changes_no_decoupled_parse():
    assert decouple(parse(COUPLED)) == parse(DECOUPLED)
    assert decouple(parse(DECOUPLED)) == parse(DECOUPLED)
    assert without_words(parse(COUPLED)) == without_words(parse(DECOUPLED))


def test_the_top_intent_is_the_outermost_one():
    assert top_intent(parse(COUPLED)) == "GET_WEATHER"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "there is no bracket, at position 0"),
        ("  ", "there is no bracket, at position 0"),
        ("[IN:A [SL:B c ]", r"'\[IN:A' is never closed, at position 0"),
        ("[IN:A [SL:B c ", r"'\[SL:B' is never closed, at position 6"),
        ("[IN:A ] ]", "']' follows the end of the parse, at position 8"),
        ("] [IN:A ]", "']' closes nothing, at position 0"),
        ("[IN:A ] words", "'words' follows the end of the parse, at position 8"),
        ("words [IN:A ]", "word 'words' stands before the first bracket, at position 0"),
        ("[IN:A [B c ] ]", "label 'B' is neither IN:<intent> nor SL:<slot>, at position 6"),
        ("[IN: ]", "label 'IN:' is neither"),
        ("[ IN:A ]", "label '' is neither"),
        ("[SL:A b ]", "begins with 'SL:A', not with an intent, at position 0"),
        ("[IN:A " * 5000 + "]" * 5000, f"more than {MAX_DEPTH} deep, at position 600"),
    ],
)
def test_broken_parses_are_refused_with_the_position(text, problem):
    with pytest.raises(ValueError, match=problem):
        parse(text)


def test_the_deepest_parse_allowed_is_compared():
    text = "[IN:A " * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_scores([text], [text]).exact_match == 100


@pytest.mark.parametrize(
    ("predicted", "exact", "tree", "intent"),
    [
        (GOLD, 100, 100, 100),
        (GOLD.replace("eight", "ate"), 0, 100, 100),
        (GOLD.replace("SL:ALARM_NAME", "SL:NAME"), 0, 0, 100),
        ("[IN:CREATE_ALARM [SL:ALARM_NAME work ] [SL:DATE_TIME at eight ] ]", 0, 0, 100),
        ("[IN:CREATE_ALARM [SL:DATE_TIME at eight ] ]", 0, 0, 100),
        ("[IN:CREATE_ALARM [SL:DATE_TIME at eight [SL:ALARM_NAME work ] ] ]", 0, 0, 100),
        (GOLD.replace("CREATE", "DELETE"), 0, 0, 0),
        (GOLD.replace("work", "WORK"), 0, 100, 100),
    ],
)
def test_exact_match_needs_words_and_tree_match_the_structure_alone(predicted, exact, tree, intent):
    scores = parse_scores([GOLD], [predicted])
    assert (scores.exact_match, scores.tree_match, scores.intent_accuracy) == (exact, tree, intent)
    assert scores.num_broken == 0


def test_broken_predictions_are_wrong_and_counted():
    scores = parse_scores([GOLD] * 4, [GOLD, GOLD[:-1], "", GOLD.replace("work", "walk")])
    assert (scores.exact_match, scores.tree_match, scores.intent_accuracy) == (25, 50, 50)
    assert (scores.num_utterances, scores.num_broken) == (4, 2)


def test_a_broken_gold_parse_is_refused_with_its_index():
    with pytest.raises(ValueError, match="gold parse 1: .*never closed"):
        parse_scores([GOLD, GOLD[:-1]], [GOLD, GOLD])


def test_nothing_to_score_and_differing_numbers_are_refused():
    with pytest.raises(ValueError, match="no parse to score"):
        parse_scores([], [])
    with pytest.raises(ValueError, match="1 gold parses and 2 predictions"):
        parse_scores([GOLD], [GOLD, GOLD])
