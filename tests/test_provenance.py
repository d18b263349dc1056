import json
import subprocess

import numpy as np
import pytest

from histo_utils.provenance import file_hash, git_state, record


def test_a_record_holds_the_result_and_what_made_it(tmp_path):
    path = tmp_path / "deep" / "a.json"
    result = {"scores": np.array([0.5, np.nan]), "n": np.int64(3)}
    record(result, path, profile="demo", parameters={"seed": 0}, data={}, seconds=1.26)
    found = json.loads(path.read_text())
    assert found["scores"] == [0.5, None] and found["n"] == 3
    made = found["provenance"]
    assert (made["profile"], made["seconds"]) == ("demo", 1.3)
    assert made["packages"]["numpy"] == np.__version__
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_nothing_is_left_when_a_result_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="provenance"):
        record(
            {"provenance": 1}, tmp_path / "a.json", profile="demo", parameters={},
            data={}, seconds=0,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_git_state_tells_code_changes_from_results(tmp_path):
    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b",
             *arguments], check=True, capture_output=True,
        )  # fmt: skip

    assert git_state(tmp_path)[0] == "unknown"
    git("init")
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    commit, dirty = git_state(tmp_path)
    assert len(commit) == 10 and dirty is False
    (tmp_path / "results" / "a.json").write_text("2")
    assert git_state(tmp_path) == (commit, False)
    (tmp_path / "code.py").write_text("2")
    assert git_state(tmp_path) == (commit, True)


def test_file_hash_of_known_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(tmp_path / "a", "md5") == "900150983cd24fb0d6963f7d28e17f72"
