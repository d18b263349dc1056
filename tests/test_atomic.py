"""Written files and folders appear whole, or what was there before stays."""

import os

import pytest

from histo_utils import provenance


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
    assert [p.name for p in path.parent.iterdir()] == ["note.txt"]


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
