"""What made a result is recorded; files and folders appear whole or not at all."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from histo_utils import provenance
from histo_utils.provenance import code_hash, file_hash, git_state, record


def test_a_record_holds_the_result_and_what_made_it(tmp_path):
    path = tmp_path / "deep" / "a.json"
    result = {"scores": np.array([0.5, np.nan]), "n": np.int64(3)}
    given = {"profile": "demo", "parameters": {"seed": 0}, "data": {}, "seconds": 1.26}
    assert record(result, path, **given) == json.loads(path.read_text())
    found = json.loads(path.read_text())
    assert found["scores"] == [0.5, None] and found["n"] == 3
    made = found["provenance"]
    assert (made["profile"], made["seconds"]) == ("demo", 1.3)
    assert made["packages"]["numpy"] == np.__version__
    assert "Profile `demo`" in provenance.credit(found)
    with pytest.raises(ValueError, match="provenance"):
        record({"provenance": 1}, tmp_path / "b.json", **given)
    assert [p.name for p in tmp_path.rglob("*.*")] == ["a.json"]


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


@pytest.fixture
def toy(tmp_path):
    """A package: a imports b (inside a function) and b imports sub.c; d stands alone.

    Returns a function that replaces text in a file and hashes a.
    """
    folder = tmp_path / "toy"
    (folder / "sub").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "sub" / "__init__.py").write_text("")
    (folder / "a.py").write_text(
        '"""Doc."""\nimport numpy\n\n\ndef f(x):\n    """Doc."""\n    '
        "from toy import b\n    return b.g(x)  # why\n"
    )
    (folder / "b.py").write_text("from toy.sub.c import C\n\n\ng = C\n")
    (folder / "sub" / "c.py").write_text('class C:\n    """Doc."""\n')
    (folder / "d.py").write_text("import toy.a\n")

    def hashed(name=None, before="", after=""):
        if name:
            text = (folder / name).read_text()
            assert before in text
            (folder / name).write_text(text.replace(before, after))
        code_hash.cache_clear()
        return code_hash("a", package=folder)

    return hashed


def test_a_code_hash_follows_code_and_nothing_else(toy):
    first = toy()
    for change in (("a.py", "Doc.", "Other."), ("a.py", "# why", "# because"),
                   ("sub/c.py", "Doc.", "Other."), ("d.py", "a", "b"),
                   ("b.py", "\n\n\n", "\n")):  # fmt: skip
        assert toy(*change) == first, change
    seen = {first}
    for change in (("a.py", "b.g(x)", "b.g(x + 1)"), ("b.py", "g = C", "g = C()"),
                   ("sub/c.py", "class C:", "class C:\n    y = 'text'")):  # fmt: skip
        seen.add(toy(*change))
    assert len(seen) == 4
    with pytest.raises(ValueError, match=r"no module histo_utils\.mosiac"):
        code_hash("mosiac")


def test_the_package_imports_what_a_code_hash_can_follow():
    """No relative imports, which it would not see; encoders reach their networks."""
    package = Path(provenance.__file__).parent
    for path in package.rglob("*.py"):
        assert "from ." not in path.read_text("utf-8"), path
    assert len(code_hash("encoders")) == 64 and code_hash("slides") != code_hash("jobs")


@pytest.mark.parametrize("before", [None, "old"])
def test_an_error_on_the_way_leaves_what_was_there(tmp_path, before):
    path = tmp_path / "deep" / "note.txt"
    if before:
        path.parent.mkdir()
        path.write_text(before)
    with pytest.raises(RuntimeError, match="full"), provenance.new_file(path) as part:
        part.write_text("half")
        assert not path.exists() if before is None else path.read_text() == before
        raise RuntimeError("disk full")
    assert [p.name for p in path.parent.iterdir()] == (["note.txt"] if before else [])
    assert before is None or path.read_text() == before
    with provenance.new_file(path) as part:
        part.write_text("whole")
    assert path.read_text() == "whole"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_leaves_what_was_there_and_the_next_run_works(tmp_path, kind):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork, to kill a process while it writes")

    def write(text, die=False):
        if kind == "file":
            with provenance.new_file(tmp_path / "it") as part:
                part.write_text(text)
                die and os._exit(1)
        else:
            with provenance.new_folder(tmp_path / "it", {"a"}, "ours") as fresh:
                (fresh / "a").write_text(text)
                die and os._exit(1)

    def read():
        path = tmp_path / "it"
        return (path if kind == "file" else path / "a").read_text()

    write("old")
    child = os.fork()
    if child == 0:
        write("half", die=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert read() == "old"
    write("new")
    assert read() == "new"


def test_a_folder_takes_the_place_of_its_own_kind_only(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("mine")
    with (
        pytest.raises(FileExistsError, match=r"set holds 'mine.txt'.*saved sets"),
        provenance.new_folder(tmp_path / "set", {"a"}, "saved sets"),
    ):
        pytest.fail("it was given out")
    assert (tmp_path / "set" / "mine.txt").read_text() == "mine"
    (tmp_path / "set" / "mine.txt").rename(tmp_path / "set" / "a")
    with provenance.new_folder(tmp_path / "set", {"a"}, "saved sets") as fresh:
        (fresh / "a").write_text("ours")
    assert (tmp_path / "set" / "a").read_text() == "ours"
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
