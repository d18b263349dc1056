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
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
RESULTS = {"table": {"dice": 0.8371, "n": 688}}
PYTHON = {"name": "python", "pygments_lexer": "ipython3"}
PARAMETERS = "mpp: float = 0.5  # micrometres per pixel"


def notebook(title="Stub", code="print(1)", outputs=(), **metadata):
    def cell(kind, source, *tags, **more):
        return {
            "cell_type": kind,
            "source": source,
            "metadata": {"tags": list(tags)},
            "id": f"id{abs(hash(source)) % 10**8}",
            **more,
        }

    empty = {"outputs": [], "execution_count": None}
    text = (
        f"(sec-{title.lower()})=\n# {title}\n\n[![Open in Colab]({BADGE})](https://x.y)"
    )
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
    histo["date"] = "2026-01-02T03:04:05+00:00"
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
    write(
        tmp_path / "conf.py",
        f"""
        import sys
        sys.path.insert(0, {str(ROOT / "_ext")!r})
        extensions = ["myst_nb", "executed_notebooks"]
        nb_execution_mode = "off"
        myst_enable_extensions = ["colon_fence", "substitution"]
        exclude_patterns = ["_build"]
        """.replace("\n        ", "\n"),
    )
    pages = "```{toctree}\n:glob:\nnotebooks/*\n```\n"
    write(tmp_path / "index.md", f"# Book\n\n{pages}")
    write(tmp_path / "notebooks/01_stub.ipynb", notebook())
    write(tmp_path / "_build/executed/demo/01_stub.ipynb", executed())
    write(tmp_path / "results/tissue/02_stub.json", RESULTS)
    badge = "book/_static/colab-badge.svg"
    write(tmp_path / badge, (ROOT / badge).read_text("utf8"))
    return tmp_path


def build(book, profile="demo"):
    """Build with warnings as errors; return the exit status and what was said."""
    words = ["-m", "sphinx", "-W", "--keep-going", "-q", ".", "_build/html"]
    env = {**os.environ, "PROFILE": profile, "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=book, env=env, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def page(book, name="notebooks/01_stub"):
    return (book / f"_build/html/{name}.html").read_text("utf8")


def test_page_shows_outputs_status_and_a_local_badge(book):
    status, said = build(book)
    assert status == 0, said
    html = page(book)
    assert "an output" in html
    assert "synthetic" in html and "2026-01-02 03:04 UTC" in html
    assert "abcdef1234" in html
    assert html.index("<h1>") < html.index("edition") < html.index("colab-badge")
    assert BADGE not in html


def test_the_atlas_of_the_profile_lies_beside_the_pages(book):
    write(book / "_build/atlas/demo/atlas.html", "<title>demo atlas</title>")
    write(book / "_build/atlas/tissue/atlas.html", "<title>tissue atlas</title>")
    status, said = build(book)
    assert status == 0, said
    assert page(book, "atlas") == "<title>demo atlas</title>"


def test_missing_failed_and_stale_copies_are_errors_until_mended(book):
    made = book / "_build/executed/demo"
    for name, title in [("02_new", "New"), ("03_bad", "Bad"), ("04_old", "Old")]:
        write(book / f"notebooks/{name}.ipynb", notebook(title))
    write(book / "notebooks/05_died.ipynb", notebook("Died"))
    write(made / "03_bad.ipynb", executed("Bad", exception=True))
    write(made / "04_old.ipynb", executed("Old", code="print(2)"))
    write(made / "05_died.ipynb", executed("Died"))
    write(made / "05_died.failed.ipynb", executed("Died", exception=True))
    status, said = build(book)
    assert status != 0
    assert "it was not run: there is no _build/executed/demo/02_new.ipynb" in said
    assert "its run failed, see _build/executed/demo/03_bad.ipynb" in said
    assert "its code changed since the run" in said and "04_old.ipynb" in said
    assert "its last run failed, see _build/executed/demo/05_died.failed" in said
    assert "01_stub" not in said

    (made / "05_died.failed.ipynb").unlink()
    for name, title in [("02_new", "New"), ("03_bad", "Bad"), ("04_old", "Old")]:
        write(made / f"{name}.ipynb", executed(title))
    status, said = build(book)
    assert status == 0, said
    assert "an output" in page(book, "notebooks/02_new")


def test_another_profile_shows_its_own_copies(book):
    assert build(book)[0] == 0
    status, said = build(book, profile="tissue")
    assert status != 0 and "no _build/executed/tissue/01_stub.ipynb" in said
    made = executed()
    made["metadata"]["histo"]["profile"] = "tissue"
    write(book / "_build/executed/tissue/01_stub.ipynb", made)
    status, said = build(book, profile="tissue")
    assert status == 0, said
    assert "real tissue" in page(book) and "synthetic" not in page(book)


def test_prose_takes_numbers_from_results_and_follows_them(book):
    text = """
        Dice {{ "{:.2f}".format(r.ch02.table.dice) }} or
        {{ "%.3f"|format(r.ch02.table.dice) }}, n {{ r.ch02.table.n }}.

        Later {{ "{:.2f}".format(r.ch07.table.dice) }}, whole
        {{ "{:.2f} of {}".format(r.ch07.a, r.ch07.b[0]) if r.ch07 else "not run yet" }}.
        """
    index = (book / "index.md").read_text("utf8")
    write(book / "index.md", index + textwrap.dedent(text))
    status, said = build(book)
    assert status == 0, said
    html = " ".join(page(book, "index").split())
    assert "Dice 0.84 or 0.837, n 688." in html
    assert "Later not run, whole not run yet." in html

    write(book / "results/tissue/02_stub.json", {"table": {"dice": 0.5, "n": 3}})
    assert build(book)[0] == 0
    assert "Dice 0.50 or 0.500, n 3." in " ".join(page(book, "index").split())


def test_a_misspelt_result_is_an_error(book):
    index = (book / "index.md").read_text("utf8")
    write(book / "index.md", index + "\n{{ r.ch02.table.dise }} {{ r.chapter2 }}\n")
    status, said = build(book)
    assert status != 0
    assert "'dise'" in said and "'chapter2'" in said


# --- tools/check_links.py


def check_links(folder):
    tool = ROOT / "tools/check_links.py"
    done = subprocess.run(
        [sys.executable, tool, folder], capture_output=True, text=True
    )
    return done.returncode, done.stdout


def test_link_checker_passes_sound_pages(tmp_path):
    links = '<a href="b.html#x">b</a> <a href="https://x.y/">y</a> <a href="#top">t</a>'
    write(tmp_path / "a.html", links + '<img src="data:image/png;base64,AA==">')
    write(tmp_path / "b.html", '<p id="x"><a href="a.html">a</a></p>')
    assert check_links(tmp_path) == (0, "2 pages, 0 findings\n")


@pytest.mark.parametrize(
    ("html", "finding"),
    [
        ('<a href="gone.html">x</a>', "no such file: gone.html"),
        ('<a href="#gone">x</a>', "no such anchor: #gone"),
        ('<img src="gone.png">', "no such file: gone.png"),
        ('<script src="https://x.y/z.js"></script>', "fetched from another site"),
        ('<img src="//x.y/z.png">', "fetched from another site"),
        ('<link rel="stylesheet" href="https://x.y/z.css">', "fetched from another"),
    ],
)
def test_link_checker_finds(tmp_path, html, finding):
    write(tmp_path / "a.html", html)
    status, said = check_links(tmp_path)
    assert status == 1 and f"a.html: {finding}" in said


def test_link_checker_refuses_an_empty_folder(tmp_path):
    assert check_links(tmp_path)[0] == 1


# --- the real configuration, in a browser


@pytest.fixture(scope="module")
def small_book(tmp_path_factory):
    """Two pages and a chapter, built with this book's own configuration."""
    folder = tmp_path_factory.mktemp("book")
    for name in ("_ext", "book/_static"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "_config.yml", folder)
    toc = [
        "format: jb-book",
        "root: book/intro",
        "chapters:",
        "- file: notebooks/01_stub",
    ]
    write(folder / "_toc.yml", "\n".join(toc))
    write(folder / "book/intro.md", "# Book\n\nMaths $x^2$, {ref}`sec-stub`.\n")
    write(folder / "book/references.bib", "")
    write(folder / "notebooks/01_stub.ipynb", notebook())
    write(folder / "_build/executed/demo/01_stub.ipynb", executed())
    tool = Path(sys.executable).with_name("jupyter-book")
    words = [tool, "build", ".", "-W", "-n", "--keep-going", "-q"]
    env = {**os.environ, "PROFILE": "demo"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "_build/html"


@pytest.mark.slow
def test_this_books_configuration_builds_sound_pages(small_book):
    assert (small_book / "index.html").exists()
    status, said = check_links(small_book)
    assert status == 0, said
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
    url = copy.as_uri()
    done = subprocess.run(
        [browser, *flags, url], capture_output=True, text=True, timeout=60
    )
    assert "Stub" in done.stdout
    events = json.loads(log.read_text("utf8"))["events"]
    asked = [e["params"] for e in events if "initiator" in e.get("params", {})]
    # The browser's own errands (updates, spelling) come from no origin.
    urls = {a["url"] for a in asked if a["initiator"] != "not an origin"}
    assert urls == {canary}


def test_a_score_carries_its_words(tmp_path):
    sys.path.insert(0, str(ROOT / "_ext"))
    from executed_notebooks import read_results

    score = {"score": 0.8371, "low": 0.8, "high": 0.9}
    gap = {"difference": 0.0512, "low": -0.1, "high": 0.2}
    (tmp_path / "02_x.json").write_text(json.dumps({"a": {"dice": score}, "b": gap}))
    found = read_results(tmp_path)["ch02"]
    assert found["a"]["dice"]["ci"] == "0.84 [0.80,\u00a00.90]"
    assert found["b"]["ci"] == "+0.05 [\u22120.10,\u00a0+0.20]"


def typed(text):
    """Words as one types them: spaces that break, and hyphens for minus."""
    return text.replace("\u00a0", " ").replace("\u2212", "-")


@pytest.mark.parametrize(
    ("difference", "p", "words"),
    [
        (
            0.05,
            {"p": 0.01, "p_holm": 0.2},
            "no significant difference: +0.05 [-0.10, +0.20], p 0.200",
        ),
        (0.05, {"p": 0.01, "p_holm": 0.04}, "higher: +0.05 [-0.10, +0.20], p 0.040"),
        (-0.05, {"p": 0.0001}, "lower: -0.05 [-0.10, +0.20], p < 0.001"),
    ],
)
def test_a_comparison_says_what_it_means(tmp_path, difference, p, words):
    sys.path.insert(0, str(ROOT / "_ext"))
    from executed_notebooks import read_results

    gap = {"difference": difference, "low": -0.1, "high": 0.2, "detectable": 0.08, **p}
    (tmp_path / "02_x.json").write_text(json.dumps(gap))
    assert typed(read_results(tmp_path)["ch02"]["verdict"]) == f"{words}, ±0.08"


def test_a_row_of_etas_carries_both_its_words(tmp_path):
    sys.path.insert(0, str(ROOT / "_ext"))
    from executed_notebooks import read_results

    row = {"eta_p": 0.8, "low": 0.7, "high": 0.9, "difference": 0.1, "p": 0.2}
    row |= {"difference_low": -0.1, "difference_high": 0.3, "detectable": 0.25}
    few = {"score": 0.5, "low": None, "high": None}
    whole = {"row": row, "few": few, "by_share": {"score": few}, "bare": {"score": 0.5}}
    (tmp_path / "04_x.json").write_text(json.dumps(whole))
    found = read_results(tmp_path)["ch04"]
    assert typed(found["row"]["ci"]) == "0.80 [0.70, 0.90]"
    assert typed(found["row"]["versus"]) == "+0.10 [-0.10, +0.30], p 0.200, ±0.25"
    assert found["few"]["ci"] == "0.50"
    assert "ci" not in found["by_share"] and "ci" not in found["bare"]


def test_all_committed_results_can_be_read():
    sys.path.insert(0, str(ROOT / "_ext"))
    from executed_notebooks import read_results

    found = read_results(ROOT / "results" / "tissue")
    assert found["ch07"]["scores"]["start"]["scan"]["ci"].startswith("0.")
