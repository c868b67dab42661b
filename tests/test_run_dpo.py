"""Who may train in a folder: one at a time, and nobody in one that is finished."""

from types import SimpleNamespace

import pytest

from llava.run_folder import only_writer
from train.llava_hound_dpo import run_dpo
from train.llava_hound_dpo.checkpoints import is_finished, mark_complete


def test_a_finished_training_is_known_and_another_is_refused(tmp_path):
    assert not is_finished(tmp_path, {"beta": 0.1})
    mark_complete(tmp_path, {"beta": 0.1, "heads": {1: (0, 3)}})
    assert is_finished(tmp_path, {"beta": 0.1, "heads": {1: (0, 3)}})
    with pytest.raises(ValueError, match=r"of another run \(beta 0\.1 there, 0\.2 here\): choose another --output_dir"):
        is_finished(tmp_path, {"beta": 0.2, "heads": {1: (0, 3)}})


def test_a_second_training_in_a_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("llava.run_folder.PATIENCE_S", 0.1)
    with only_writer(tmp_path / "training"):
        with pytest.raises(ValueError, match="another process is writing there"):
            run_dpo.claim(SimpleNamespace(output_dir=str(tmp_path), dry_run=False))
        run_dpo.claim(SimpleNamespace(output_dir=str(tmp_path), dry_run=True))  # a plan writes nothing
