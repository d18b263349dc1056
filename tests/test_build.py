"""The build refuses chapters that were not run, and pages that do not hold together."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "_ext"))
import executed_notebooks  # noqa: E402
import results_figures  # noqa: E402

BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
NONE = "no significant difference"
RESULTS = {"table": {"dice": 0.8371, "n": 688}}
PYTHON = {"name": "python", "pygments_lexer": "ipython3"}
PARAMETERS = "mpp: float = 0.5  # micrometres per pixel"


def notebook(title="Stub", code="print(1)", outputs=(), **metadata):
    def cell(kind, source, *tags, **more):
        own = {"metadata": {"tags": list(tags)}, "id": f"i{abs(hash(source)) % 10**8}"}
        return {"cell_type": kind, "source": source, **own, **more}

    empty = {"outputs": [], "execution_count": None}
    label = f"(sec-{title.lower()})=\n# {title}\n\n"
    text = f"{label}[![Open in Colab]({BADGE})](https://x.y)"
    cells = [
        cell("markdown", text),
        cell("code", PARAMETERS, "parameters", **empty),
        cell("code", code, **{**empty, "outputs": list(outputs)}),
    ]
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def executed(title="Stub", code="print(1)", **papermill):
    """What papermill and the runner leave: outputs, an injected cell, metadata."""
    outputs = [{"output_type": "stream", "name": "stdout", "text": "an output\n"}]
    histo = {"profile": "demo", "commit": "abcdef123456", "dirty": False}
    histo |= {"date": "2026-01-02T03:04:05+00:00", "data": {"phantom": "synthetic 0"}}
    about = {"papermill": papermill, "histo": histo}
    made = notebook(title, code, outputs, language_info=PYTHON, **about)
    injected = {**made["cells"][1], "source": "# Parameters\nmpp = 0.25", "id": "inj"}
    injected["metadata"] = {"tags": ["injected-parameters"]}
    made["cells"].insert(2, injected)
    return made


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, "utf8")


@pytest.fixture
def book(tmp_path):
    """A book of one page and one executed chapter, built by plain Sphinx (fast)."""
    conf = f"""
        import sys
        sys.path.insert(0, {str(ROOT / "_ext")!r})
        extensions = ["myst_nb", "executed_notebooks"]
        nb_execution_mode = "off"
        myst_enable_extensions = ["colon_fence", "substitution"]
        exclude_patterns = ["_build"]
        """
    write(tmp_path / "conf.py", textwrap.dedent(conf))
    pages = "```{toctree}\n:glob:\nnotebooks/*\n```\n"
    write(tmp_path / "index.md", f"# Book\n\n{pages}")
    write(tmp_path / "notebooks/01_stub.ipynb", notebook())
    write(tmp_path / "_build/executed/demo/01_stub.ipynb", executed())
    write(tmp_path / "results/tissue/02_stub.json", RESULTS)
    badge = "book/_static/colab-badge.svg"
    write(tmp_path / badge, (ROOT / badge).read_text("utf8"))
    return tmp_path


def said(*words, cwd):
    """Run a command; return its exit status and what it said."""
    env = {**os.environ, "PROFILE": "demo", "NO_COLOR": "1"}
    how = {"cwd": cwd, "env": env, "capture_output": True, "text": True}
    done = subprocess.run(words, **how)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_page_shows_outputs_status_results_and_the_atlas(book):
    write(book / "_build/atlas/demo/atlas.html", "<title>demo atlas</title>")
    text = """
        Dice {{ "{:.2f}".format(r.ch02.table.dice) }}, n {{ r.ch02.table.n }}.

        Later {{ "{:.2f}".format(r.ch07.table.dice) }}, whole
        {{ "{:.2f} of {}".format(r.ch07.a, r.ch07.b[0]) if r.ch07 else "not run yet" }}.
        """
    index = (book / "index.md").read_text("utf8")
    write(book / "index.md", index + textwrap.dedent(text))
    words = ["-m", "sphinx", "-W", "--keep-going", "-q", ".", "_build/html"]
    assert said(sys.executable, *words, cwd=book) == (0, "")
    html = (book / "_build/html/notebooks/01_stub.html").read_text()
    assert "an output" in html
    assert "synthetic" in html and "2026-01-02 03:04 UTC" in html
    assert "abcdef1234" in html
    assert html.index("<h1>") < html.index("edition") < html.index("colab-badge")
    assert BADGE not in html
    assert (book / "_build/html/atlas.html").exists()
    html = " ".join((book / "_build/html/index.html").read_text().split())
    assert "Dice 0.84, n 688." in html and "Later not run, whole not run yet." in html


def test_a_page_says_what_its_data_is():
    """By the data of the run, whatever the profile is called."""

    def box(profile, **data):
        made = {"histo": {"profile": profile, "data": data}}
        return executed_notebooks.status(made, "demo", ROOT)

    assert "Tissue edition: MoNuSeg 2018" in box("tissue", monuseg="sha256:0")
    for profile in ("demo", "tissue", "paper"):
        found = box(profile, phantom="synthetic sha256:0")
        assert "edition: synthetic phantoms" in found and "**synthetic**" in found
    both = box("tissue", slides="sha256:0", anything="synthetic sha256:0")
    assert "Two open slides and synthetic phantoms" in both and "caution" in both
    assert "data not recorded" in executed_notebooks.status({}, "paper", ROOT)


def test_a_chapter_without_a_run_says_so_and_keeps_what_others_refer_to(tmp_path):
    source = notebook()
    source["cells"][2]["metadata"]["mystnb"] = {"figure": {"name": "fig-a"}}
    (tmp_path / "profiles/paper").mkdir(parents=True)
    assert executed_notebooks.runs_of("01_stub", "demo", tmp_path) == ["01_stub"]
    assert executed_notebooks.runs_of("01_stub", "paper", tmp_path) == []
    page = executed_notebooks.without_run(source, [], "paper", tmp_path)
    text = "\n".join(cell["source"] for cell in page["cells"])
    assert "This chapter has no run in the profile paper" in text
    assert ":name: fig-a" in text and not any(c.get("outputs") for c in page["cells"])


def test_a_chapter_lists_its_experiments(tmp_path):
    """What was run with its data and a link, the others with their command."""
    for run in ("01_stub.a", "01_stub.b"):
        write(tmp_path / f"profiles/paper/{run}.yaml", "profile: paper\n")
    write(tmp_path / "_build/executed/paper/01_stub.a.ipynb", executed())
    by = {"profile": "paper", "commit": "abc", "date": "2026-01-02T03:04", "seconds": 5}
    by |= {"device": "1 GPU", "data": {"tree/own": "sha256:0"}}
    rows = [{"name": "FE", "ours": 0.51234, "published": None}]
    write(tmp_path / "results/paper/01_stub.a.json", {"table": rows, "provenance": by})
    runs = executed_notebooks.runs_of("01_stub", "paper", tmp_path)
    text = executed_notebooks.experiments(notebook(), runs, "paper", tmp_path)
    assert "| {doc}`a </experiments/01_stub-a>` | `tree/own` | Profile `paper`" in text
    assert "| `b` | | not run: `make paper EXPERIMENT=01_stub.b` |" in text
    assert "| FE | 0.5123 |  |" in text


def test_missing_failed_and_stale_copies_say_why(tmp_path):
    def why(copy, failed=None):
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        for name, made in (("01_a", copy), ("01_a.failed", failed)):
            if made:
                write(tmp_path / f"made/{name}.ipynb", made)
        with pytest.raises(executed_notebooks.UnusableCopy) as error:
            executed_notebooks.read_copy(tmp_path / "made/01_a.ipynb", notebook())
        return str(error.value)

    assert "it was not run: there is no" in why(None)
    assert "its run failed, see" in why(executed(exception=True))
    assert "its last run failed" in why(executed(), failed=executed(exception=True))
    assert "its code changed since the run" in why(executed(code="print(2)"))
    write(tmp_path / "01_b.ipynb", executed(title="Newer prose"))
    found = executed_notebooks.read_copy(tmp_path / "01_b.ipynb", notebook())
    assert found["cells"][-1]["outputs"], "only code can be stale"


def test_a_misspelt_result_is_an_error(tmp_path):
    found = read(tmp_path, _02_stub=RESULTS)
    for wrong in (lambda: found["ch02"]["table"]["dise"], lambda: found["chapter2"]):
        with pytest.raises(KeyError):
            wrong()
    assert str(found["ch05"].table.dice) == "not run", "a chapter without results"


# --- make and its tools


def test_make_prints_a_line_per_chapter_and_the_traceback_of_a_failure(tmp_path):
    """With a snakemake that says what the real one and run_notebook.py do."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt", ".venv/installed"):
        write(tmp_path / name, "")
    tool = tmp_path / ".venv/bin/snakemake"
    write(tool, "#!/bin/sh\necho Select jobs\necho '[1/2] 01_a 3 s'\nexit 0\n")
    tool.chmod(0o755)
    words = ["make", "--no-print-directory", "chapters"]
    assert said(*words, cwd=tmp_path) == (0, "[1/2] 01_a 3 s\n")
    write(tool, "#!/bin/sh\necho 'Traceback: no tissue' >&2\nexit 1\n")
    status, shown = said(*words, cwd=tmp_path)
    assert status != 0 and "Traceback: no tissue" in shown


def check_links(folder):
    return said(sys.executable, ROOT / "tools/check_links.py", folder, cwd=folder)


def test_link_checker_passes_sound_pages_and_refuses_an_empty_folder(tmp_path):
    assert check_links(tmp_path)[0] == 1
    links = '<a href="b.html#x">b</a> <a href="https://x.y/">y</a> <a href="#top">t</a>'
    write(tmp_path / "a.html", links + '<img src="data:image/png;base64,AA==">')
    write(tmp_path / "b.html", '<p id="x"><a href="a.html">a</a></p>')
    assert check_links(tmp_path) == (0, "2 pages, 0 findings\n")


def test_link_checker_finds(tmp_path):
    faults = {
        '<a href="gone.html">x</a>': "no such file: gone.html",
        '<a href="#gone">x</a>': "no such anchor: #gone",
        '<img src="gone.png">': "no such file: gone.png",
        '<script src="https://x.y/z.js"></script>': "from another site: https://x.y/z.js",
        '<img src="//x.y/z.png">': "fetched from another site: //x.y/z.png",
        '<link rel="stylesheet" href="https://x.y/z.css">': "another site: https://x.y/z",
    }  # fmt: skip
    write(tmp_path / "a.html", "".join(faults))
    status, shown = check_links(tmp_path)
    assert status == 1 and "6 findings" in shown
    assert all(finding in shown for finding in faults.values())


# --- the real configuration, in a browser


@pytest.fixture(scope="module")
def small_book(tmp_path_factory):
    """Two pages and a chapter, built with this book's own configuration."""
    folder = tmp_path_factory.mktemp("book")
    for name in ("_ext", "book/_static"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "_config.yml", folder)
    toc = "format: jb-book\nroot: book/intro\nchapters:\n- file: notebooks/01_stub\n"
    write(folder / "_toc.yml", toc)
    write(folder / "book/intro.md", "# Book\n\nMaths $x^2$, {ref}`sec-stub`.\n")
    write(folder / "book/references.bib", "")
    write(folder / "notebooks/01_stub.ipynb", notebook())
    write(folder / "_build/executed/demo/01_stub.ipynb", executed())
    tool = Path(sys.executable).with_name("jupyter-book")
    status, shown = said(
        tool, *["build", ".", "-W", "-n", "--keep-going", "-q"], cwd=folder
    )
    assert status == 0, shown
    return folder / "_build/html"


@pytest.mark.slow
def test_this_books_configuration_builds_sound_pages(small_book):
    assert (small_book / "index.html").exists()
    status, shown = check_links(small_book)
    assert status == 0, shown
    html = (small_book / "notebooks/01_stub.html").read_text("utf8")
    assert "/searching-tissue/blob/main/notebooks/01_stub.ipynb" in html
    assert html.count("search-button-field") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["book/intro", "notebooks/01_stub"])
def test_no_request_leaves_a_page(small_book, tmp_path, name):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs a browser: install chromium")
    log = tmp_path / "net.json"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--log-net-log={log}"]
    flags += ["--disable-background-networking", "--disable-component-update"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=4000"]
    flags += [f"--user-data-dir={tmp_path / 'user'}", "--dump-dom"]
    # One request that must be seen: a log without it would prove nothing.
    canary = "http://canary.invalid/x.png"
    html = (small_book / f"{name}.html").read_text("utf8")
    copy = small_book / f"{name}-canary.html"
    write(copy, html.replace("</article>", f'<img src="{canary}"></article>'))
    assert "Stub" in said(browser, *flags, copy.as_uri(), cwd=tmp_path)[1]
    events = json.loads(log.read_text("utf8"))["events"]
    sent = [e["params"] for e in events if "initiator" in e.get("params", {})]
    # The browser's own errands (updates, spelling) come from no origin.
    urls = {a["url"] for a in sent if a["initiator"] != "not an origin"}
    assert urls == {canary}


# --- the words and figures of results


def read(folder, **found):
    """What prose pages get from results files of this content."""
    for name, content in found.items():
        write(folder / f"{name[1:]}.json", content)
    return executed_notebooks.read_results(folder)


def typed(text):
    """Words as one types them: spaces that break, and hyphens for minus."""
    return text.replace("\u00a0", " ").replace("\u2212", "-")


@pytest.mark.parametrize(
    ("difference", "p", "words"),
    [
        (0.05, {"p": 0.01, "p_holm": 0.2}, NONE + ": +0.05 {}, p 0.200"),
        (0.05, {"p": 0.01, "p_holm": 0.04}, "higher: +0.05 {}, p 0.040"),
        (-0.05, {"p": 0.0001}, "lower: -0.05 {}, p < 0.001"),
    ],
)  # fmt: skip
def test_a_comparison_says_what_it_means(tmp_path, difference, p, words):
    gap = {"difference": difference, "low": -0.1, "high": 0.2, "detectable": 0.08, **p}
    found = read(tmp_path, _02_x=gap)["ch02"]
    assert typed(found["verdict"]) == words.format("[-0.10, +0.20]") + ", MDD 0.08"


def test_scores_carry_their_words(tmp_path):
    row = {"eta_p": 0.8, "low": 0.7, "high": 0.9, "difference": 0.1, "p": 0.2}
    row |= {"difference_low": -0.1, "difference_high": 0.3, "detectable": 0.25}
    few = {"score": 0.5, "low": None, "high": None}
    score = {"score": 0.8371, "low": 0.8, "high": 0.9}
    whole = {"row": row, "few": few, "dice": score, "bare": {"score": 0.5}}
    found = read(tmp_path, _04_x=whole | {"by_share": {"score": few}})["ch04"]
    assert found["dice"]["ci"] == "0.84 [0.80,\u00a00.90]"
    assert typed(found["row"]["ci"]) == "0.80 [0.70, 0.90]"
    assert typed(found["row"]["versus"]) == "+0.10 [-0.10, +0.30], p 0.200, MDD 0.25"
    assert found["few"]["ci"] == "0.50"
    assert "ci" not in found["by_share"] and "ci" not in found["bare"]


def test_committed_results_can_be_read_and_drawn(tmp_path):
    found = executed_notebooks.read_results(ROOT / "results" / "tissue")
    assert found["ch07"]["scores"]["histogram"]["scan"]["ci"].startswith("0.")
    drawn = results_figures.draw(ROOT / results_figures.FILE, tmp_path)
    assert [path.name for path in drawn] == ["systems.svg", "risk_coverage.svg"]
    assert all("</svg>" in path.read_text() for path in drawn)
    assert results_figures.draw(tmp_path / "none.json", tmp_path) == []
