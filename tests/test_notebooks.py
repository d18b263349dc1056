"""Every chapter has the shape that readers, papermill and the book rely on."""

import json
import re
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
import yaml

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
PROFILE_FILES = sorted((ROOT / "profiles").glob("*/*.yaml"))
PARAMETER = re.compile(r"\w+: [\w\[\], ]+ = \S.*  # \S.*")
SECTIONS = [
    "Where we differ",
    "Results",
    "Key takeaways",
    "Questions",
    "Further reading",
]
# What every chapter may have does not count as its own.
SHARED = {"profile", "dataset", "results", "seed", "seeds", "workers", "precision"}
SHARED |= {"devices", "accumulate"}
CODE_LINES, PARAMETERS = 250, 20
every_chapter = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def cells(path, kind):
    """The cells of one kind as (source, metadata)."""
    notebook = json.loads(path.read_text("utf8"))
    return [
        ("".join(c["source"]), c["metadata"])
        for c in notebook["cells"]
        if c["cell_type"] == kind
    ]


def code_lines(source):
    return [line for line in source.splitlines() if line.strip()]


def parameter_names(path):
    return set(papermill.inspect_notebook(str(path)))


def test_there_are_chapters():
    assert NOTEBOOKS, "notebooks/ holds no chapter"


@every_chapter
def test_parameters_cell_holds_typed_documented_parameters_only(path):
    tagged = [s for s, m in cells(path, "code") if "parameters" in m.get("tags", [])]
    assert len(tagged) == 1, "one code cell has the tag 'parameters'"
    for line in code_lines(tagged[0]):
        assert PARAMETER.fullmatch(line), f"not `name: type = default  # what`: {line}"
    # papermill understands plain types only: `str`, `list[int]`, not `str | None`
    assert len(parameter_names(path)) == len(code_lines(tagged[0]))


@every_chapter
def test_no_outputs_in_git(path):
    for cell in json.loads(path.read_text("utf8"))["cells"]:
        assert not cell.get("outputs"), "strip it: nbstripout --keep-id"
        assert cell.get("execution_count") is None, "strip it: nbstripout --keep-id"


@every_chapter
def test_size_limits(path):
    code = [s for s, m in cells(path, "code") if "parameters" not in m.get("tags", [])]
    assert len(json.loads(path.read_text("utf8"))["cells"]) <= 60
    assert sum(len(code_lines(s)) for s in code) <= CODE_LINES
    for source in code:
        assert len(code_lines(source)) <= 25, source
        assert max(map(len, source.splitlines()), default=0) <= 88, "wider than a page"
        assert "inspect.getsource" not in source, "a page shows code, it prints none"
    assert len(parameter_names(path) - SHARED) <= PARAMETERS


@every_chapter
def test_opening(path):
    first = cells(path, "markdown")[0][0]
    assert re.match(r"\(sec-[\w-]+\)=\n+# \S", first), "label, then title"
    colab = f"colab.research.google.com/github/{repository()}/blob/main/notebooks/"
    assert colab + path.name in first, "no Colab link to this notebook"
    assert "In this chapter" in "\n".join(s for s, _ in cells(path, "markdown")[:3])


@every_chapter
def test_sections(path):
    text = "\n".join(s for s, _ in cells(path, "markdown"))
    headings = re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE)
    places = [headings.index(s) if s in headings else None for s in SECTIONS]
    assert None not in places, f"sections {SECTIONS}, found {headings}"
    assert places == sorted(places), f"sections out of order: {headings}"


@every_chapter
def test_figures_have_caption_name_and_alt_text(path):
    for source, metadata in cells(path, "code"):
        mystnb = metadata.get("mystnb", {})
        if "figure" in mystnb:
            assert mystnb["figure"].get("caption"), source
            assert mystnb["figure"].get("name", "").startswith("fig-"), source
        if "figure" in mystnb or "image" in mystnb:
            assert mystnb.get("image", {}).get("alt"), source


@every_chapter
def test_nothing_the_page_would_fetch(path):
    code = "\n".join(s for s, _ in cells(path, "code"))
    assert not re.search(r"tqdm\.(notebook|auto|autonotebook)|ipywidgets", code), (
        "widgets load scripts from the network: use `from tqdm import tqdm`"
    )


@pytest.mark.parametrize(
    "path", PROFILE_FILES, ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_profile_keys_are_parameters_of_the_notebook(path):
    notebook = ROOT / "notebooks" / f"{path.stem}.ipynb"
    assert notebook.exists(), f"{path} belongs to no notebook"
    keys = set(yaml.safe_load(path.read_text("utf8")) or {})
    assert keys <= parameter_names(notebook), f"known: {parameter_names(notebook)}"


def repository():
    url = yaml.safe_load((ROOT / "_config.yml").read_text("utf8"))["repository"]["url"]
    return url.removeprefix("https://github.com/")


# --- tools/run_notebook.py, on a notebook of its own


def tiny_notebook(folder, code="print(mpp)"):
    def cell(source, *tags):
        empty = {"outputs": [], "execution_count": None, "cell_type": "code"}
        return {**empty, "source": source, "metadata": {"tags": list(tags)}, "id": "c"}

    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    parameters = 'profile: str = "demo"  # which\nmpp: float = 0.5  # um per pixel'
    notebook = {
        "cells": [cell(parameters, "parameters"), cell(code) | {"id": "d"}],
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    for name in ("notebooks", "profiles/tissue"):
        (folder / name).mkdir(parents=True)
    (folder / "notebooks/01_tiny.ipynb").write_text(json.dumps(notebook))


def run_tool(folder, *words):
    tool = [sys.executable, ROOT / "tools/run_notebook.py", *words]
    done = subprocess.run(tool, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_misspelt_parameter_is_refused_with_the_nearest_name(tmp_path):
    tiny_notebook(tmp_path)
    (tmp_path / "profiles/tissue/01_tiny.yaml").write_text("mmp: 0.25\n")
    status, said = run_tool(tmp_path, "01_tiny", "--profile", "tissue")
    assert status == 1
    assert "'mmp'" in said and "did you mean: mpp" in said
    assert not (tmp_path / "_build").exists(), "refused before anything runs"


@pytest.mark.parametrize(
    ("words", "near"),
    [(["01_tinny"], "01_tiny"), (["01_tiny", "--profile", "tisue"], "tissue")],
)
def test_misspelt_chapter_or_profile_is_refused(tmp_path, words, near):
    tiny_notebook(tmp_path)
    status, said = run_tool(tmp_path, *words)
    assert status == 1 and f"did you mean: {near}" in said


@pytest.mark.slow
def test_a_run_leaves_a_copy_that_says_what_made_it(tmp_path):
    tiny_notebook(tmp_path)
    (tmp_path / "profiles/tissue/01_tiny.yaml").write_text("mpp: 0.25\n")
    status, said = run_tool(tmp_path, "01_tiny", "--profile", "tissue")
    assert status == 0, said
    folder = tmp_path / "_build/executed/tissue"
    assert [p.name for p in folder.iterdir()] == ["01_tiny.ipynb"]
    copy = json.loads((folder / "01_tiny.ipynb").read_text())
    assert copy["metadata"]["histo"]["profile"] == "tissue"
    assert copy["metadata"]["histo"].keys() >= {"commit", "dirty", "date"}
    assert copy["cells"][-1]["outputs"][0]["text"] == ["0.25\n"]


@pytest.mark.slow
def test_a_failed_run_keeps_a_copy_under_another_name(tmp_path):
    tiny_notebook(tmp_path, code="raise ValueError('no tissue')")
    status, said = run_tool(tmp_path, "01_tiny")
    assert status == 1 and "ValueError: no tissue" in said
    names = [p.name for p in (tmp_path / "_build/executed/demo").iterdir()]
    assert names == ["01_tiny.failed.ipynb"]
