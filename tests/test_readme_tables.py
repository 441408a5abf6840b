from argparse import ArgumentParser

import pytest

from speechkd.readme_tables import parse_table_arguments, require_results, show_table


def arguments(*words: str):
    return parse_table_arguments(ArgumentParser(), list(words))


def test_a_table_replaces_what_stands_between_its_markers_and_nothing_else(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- one -->\nold\n<!-- /one -->\nb\n<!-- two -->\nkept\n<!-- /two -->\n")
    show_table("| new |", arguments("--readme", str(readme), "--marker", "one"))
    assert readme.read_text() == "a\n<!-- one -->\n| new |\n<!-- /one -->\nb\n<!-- two -->\nkept\n<!-- /two -->\n"
    before = readme.read_text()
    with pytest.raises(SystemExit, match="lacks <!-- three --> or <!-- /three -->"):
        show_table("| new |", arguments("--readme", str(readme), "--marker", "three"))
    assert readme.read_text() == before


def test_without_a_readme_the_table_is_printed(capsys):
    show_table("| a |", arguments())
    assert capsys.readouterr().out == "| a |\n"


@pytest.mark.parametrize("words", [("--readme", "README.md"), ("--marker", "one")])
def test_a_readme_and_its_marker_go_together(words, capsys):
    with pytest.raises(SystemExit):
        arguments(*words)
    assert "--readme and --marker, the name of the place in that file, go together" in capsys.readouterr().err


def test_folders_that_were_not_evaluated_are_all_named(tmp_path):
    (tmp_path / "done").mkdir()
    (tmp_path / "done/results.json").touch()
    require_results([tmp_path / "done"])
    with pytest.raises(SystemExit, match=f"no results.json in {tmp_path}/a, {tmp_path}/b; run the evaluate stage"):
        require_results([tmp_path / "a", tmp_path / "done", tmp_path / "b"])
