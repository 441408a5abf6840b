import pytest

from speechkd.stages import begin, end


def test_a_finished_stage_is_skipped_and_a_killed_one_runs_again(tmp_path):
    stamp = tmp_path / ".stage.json"
    assert begin(stamp, {"a": 1}, force=False, outputs=[])
    assert begin(stamp, {"a": 1}, force=False, outputs=[])  # never ended: a kill
    end(stamp)
    assert not begin(stamp, {"a": 1}, force=False, outputs=[])


def test_a_changed_configuration_is_refused_and_force_starts_over(tmp_path):
    stamp, output = tmp_path / ".stage.json", tmp_path / "out"
    begin(stamp, {"trainer.seed": 1}, force=False, outputs=[output])
    output.mkdir()
    end(stamp)
    with pytest.raises(ValueError, match="trainer.seed was 1, now 2.*--force"):
        begin(stamp, {"trainer.seed": 2}, force=False, outputs=[output])
    assert output.exists()
    assert begin(stamp, {"trainer.seed": 2}, force=True, outputs=[output])
    assert not output.exists()


def test_a_stage_that_failed_before_it_wrote_anything_may_be_tried_with_other_inputs(tmp_path):
    stamp = tmp_path / "out/.stage-prepare.json"
    begin(stamp, {"corpus_dir": "wrong"}, force=False, outputs=[tmp_path / "out"])
    assert begin(stamp, {"corpus_dir": "right"}, force=False, outputs=[tmp_path / "out"])
    (tmp_path / "out/half").touch()
    with pytest.raises(ValueError, match="corpus_dir was 'right', now 'other'"):
        begin(stamp, {"corpus_dir": "other"}, force=False, outputs=[tmp_path / "out"])


def test_a_setting_that_a_newer_version_added_and_that_is_null_changes_nothing(tmp_path):
    stamp = tmp_path / ".stage.json"
    begin(stamp, {"teacher.name": "t"}, force=False, outputs=[])
    end(stamp)
    assert not begin(stamp, {"teacher.name": "t", "teacher.dtype": None}, force=False, outputs=[])


def test_what_only_adds_to_a_result_may_be_left_out_later_but_not_added(tmp_path):
    stamp, options = tmp_path / ".stage.json", {"force": False, "outputs": [], "extras": ["teacher.stored_outputs"]}
    begin(stamp, {"teacher": {"name": "t", "stored_outputs": "topk"}}, **options)
    end(stamp)
    assert not begin(stamp, {"teacher": {"name": "t", "stored_outputs": None}}, **options)
    with pytest.raises(ValueError, match="stored_outputs was 'topk', now 'decoder_states'"):
        begin(stamp, {"teacher": {"name": "t", "stored_outputs": "decoder_states"}}, **options)
    with pytest.raises(ValueError, match="name was 't', now 'u'"):
        begin(stamp, {"teacher": {"name": "u", "stored_outputs": None}}, **options)
    begin(tmp_path / "other.json", {"teacher": {"name": "t"}}, **options)
    end(tmp_path / "other.json")
    with pytest.raises(ValueError, match="stored_outputs was None, now 'topk'"):
        begin(tmp_path / "other.json", {"teacher": {"name": "t", "stored_outputs": "topk"}}, **options)
