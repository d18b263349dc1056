"""Show executed notebooks and committed results in the book.

papermill runs the chapters and Sphinx only renders, so this extension puts the
outputs of ``_build/executed/<profile>/<chapter>.ipynb`` into the page of
``notebooks/<chapter>.ipynb`` while Sphinx reads it. Labels, links, the Colab button
and the download stay those of the source. A copy that is missing, failed or stale is
a warning, hence an error under ``-W``. A chapter without a parameter file in the
profile does not run in it, and its page says so; one with several, the experiments of
``profiles/paper``, has a table of them (their pages: tools/experiment_pages.py).

It also makes ``results/tissue/<chapter>.json`` available to the prose of every page:
``{{ "{:.2f}".format(r.ch02.table.dice) }}``, or for a score with its interval
``{{ r.ch02.table.dice.ci }}``.

The atlas that chapter 9 wrote to ``_build/atlas/<profile>/atlas.html`` is copied beside
the pages, where the chapter links to it.
"""

import json
import os
import re
import shutil
from pathlib import Path

import yaml
from sphinx.util import logging

logger = logging.getLogger(__name__)

# Fetched from Google by every reader's browser; the book shows a picture of its own.
COLAB_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
LOCAL_BADGE = "/book/_static/colab-badge.svg"
NOT_RUN = "/book/_static/not_run.svg"


class UnusableCopy(Exception):
    """Why an executed copy cannot be shown."""


class NotRun:
    """What a chapter without results gives: false, and "not run" in any format."""

    def __getattr__(self, name):
        """Be every value of the chapter (but no special method of Python's)."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key):
        return self

    def __bool__(self):
        return False

    def __str__(self):
        return "not run"

    def __format__(self, spec):
        return "not run"


class Results(dict):
    """Results by chapter; a chapter that has none yet is `NotRun`.

    Only names like ``ch05`` are forgiven. A misspelt chapter or value stays an error.
    """

    def __missing__(self, key):
        if re.fullmatch(r"ch\d\d", key):
            return NotRun()
        raise KeyError(key)


def results_key(stem):
    """Name a results file in Jinja: 02_mosaic_extraction -> ch02."""
    number = re.match(r"(\d\d)_", stem)
    return f"ch{number[1]}" if number else re.sub(r"\W", "_", stem)


def with_text(found):
    """Add ``ci``, the words for a score, η or a difference with its interval.

    A comparison also gets ``versus``: with its p (after Holm's correction where there
    was one) and the minimum detectable difference; and ``verdict``, which first says
    what that means at a level of 5 %.
    """
    gap = _interval(found, "difference", "{:+.2f}")
    words = [_interval(found, name, "{:.2f}") for name in ("score", "eta_p")]
    if ci := next(filter(None, [*words, gap]), None):
        found["ci"] = ci
    if gap and None not in (found.get("detectable"), found.get("p")):
        p = found.get("p_holm", found["p"])
        text = "p\N{NO-BREAK SPACE}" + ("< 0.001" if p < 0.001 else f"{p:.3f}")
        found["versus"] = f"{gap}, {text}, MDD {found['detectable']:.2f}"
        side = "higher" if found["difference"] > 0 else "lower"
        side = side if p < 0.05 else "no significant difference"
        found["verdict"] = f"{side}: {found['versus']}"
    return found


def _interval(found, name, form):
    """Words for one value and its interval, whose ends may bear its name."""
    own = f"{name}_low" in found
    ends = (f"{name}_low", f"{name}_high") if own else ("low", "high")
    if not {name, *ends} <= found.keys():
        return None
    numbers = [found[key] for key in (name, *ends)]
    if None in numbers:  # too few patients for an interval, or no score
        return "–" if numbers[0] is None else form.format(numbers[0])
    value, low, high = (form.format(n).replace("-", "\N{MINUS SIGN}") for n in numbers)
    return f"{value} [{low},\N{NO-BREAK SPACE}{high}]"


def read_results(folder):
    """Read every results file of a folder."""
    return Results(
        (
            results_key(path.stem),
            json.loads(path.read_text("utf8"), object_hook=with_text),
        )
        for path in sorted(Path(folder).glob("*.json"))
    )


def add_results(app, config):
    """Offer the results as the substitution ``r``; changed ones rebuild the pages."""
    results = read_results(Path(app.srcdir) / "results" / "tissue")
    config.myst_substitutions = {**config.myst_substitutions, "r": results}


def source_text(cell):
    """Return a cell's source, which may be stored as one text or as lines."""
    return "".join(cell["source"])


def code_cells(notebook):
    """List the code cells, without the one papermill puts in."""
    return [
        cell
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and not is_injected(cell)
    ]


def is_injected(cell):
    """Say whether papermill wrote this cell."""
    return "injected-parameters" in cell["metadata"].get("tags", [])


def read_copy(path, notebook):
    """Return the executed copy of a notebook, or say why it cannot be shown."""
    failed = path.with_suffix(".failed.ipynb")
    if failed.exists():
        raise UnusableCopy(f"its last run failed, see {failed}")
    if not path.exists():
        raise UnusableCopy(f"it was not run: there is no {path}")
    copy = json.loads(path.read_text("utf8"))
    if copy["metadata"].get("papermill", {}).get("exception"):
        raise UnusableCopy(f"its run failed, see {path}")
    sources = [[source_text(c) for c in code_cells(nb)] for nb in (notebook, copy)]
    if sources[0] != sources[1]:
        raise UnusableCopy(f"its code changed since the run that left {path}")
    return copy


def with_outputs(notebook, copy):
    """Put a copy's outputs into the source, whose prose and captions are newer."""
    ran = iter(code_cells(copy))
    injected = [c for c in copy["cells"] if is_injected(c)]
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            done = next(ran)
            keep = {k: done[k] for k in ("outputs", "execution_count")}
            cell = {**cell, **keep}
        cells.append(cell)
        if "parameters" in cell["metadata"].get("tags", []):
            cells += injected
    metadata = {**notebook["metadata"], **copy["metadata"]}
    return {**notebook, "cells": cells, "metadata": metadata}


def facts(run, seconds, profile):
    """Say in one sentence which run a page shows."""
    date = run.get("date") or "unknown date"
    commit = f"`{run.get('commit', 'unknown')[:10]}`"
    changed = " with uncommitted changes" if run.get("dirty") else ""
    took = f" in {seconds:.0f} s" if seconds else ""
    when = f"{date[:16].replace('T', ' ')} UTC{took}"
    return f"Profile `{profile}`, run {when}, commit {commit}{changed}."


def titles(data, root=Path()):
    """Name the data of a run: known sets by their titles, phantoms as synthetic."""
    path = Path(root, "histo_utils/datasets.yaml")
    known = yaml.safe_load(path.read_text("utf8")) if path.exists() else {}
    real = [name for name, of in data.items() if not str(of).startswith("synthetic")]
    found = [known.get(name, {}).get("title", f"`{name}`") for name in real]
    return [*found, "synthetic phantoms"] if len(real) < len(data) else found


def status(metadata, profile, root=Path()):
    """Write the box that stands below the title: what the data of the run were."""
    run = metadata.get("histo", {})
    profile, data = run.get("profile", profile), run.get("data")
    title = " and ".join(titles(data or {}, root)) or "data not recorded"
    kind, look = "", "edition edition-tissue"
    if not data or any(str(of).startswith("synthetic") for of in data.values()):
        look = "caution edition"
    if data and look.startswith("caution"):
        kind = (
            "The slides of phantoms are **synthetic**: "
            "they show that the code runs, and nothing on them is evidence."
        )
    if run.get("override"):
        title, look = f"{title}, in miniature", "caution edition"
        kind += " Sizes were overridden to try the code: no number here is evidence."
    text = (
        f"{kind}\n{facts(run, metadata.get('papermill', {}).get('duration'), profile)}"
    )
    box = f"{profile.capitalize()} edition: {title}\n:class: {look}\n{text.strip()}"
    return f"\n:::{{admonition}} {box}\n:::\n"


def runs_of(chapter, profile, root=Path()):
    """List the runs of a chapter in a profile, by their parameter files."""
    found = sorted(Path(root, "profiles", profile).glob(f"{chapter}*.yaml"))
    own = [p.stem for p in found if p.stem.split(".")[0] == chapter]
    return [chapter] if profile == "demo" else own


def page_of(run):
    """Name the page of an experiment's executed copy."""
    return f"experiments/{run.replace('.', '-')}"


def results_of(run, copy, root=Path()):
    """Read an experiment's results: of its copy if that is there, else committed."""
    written = (copy or {}).get("metadata", {}).get("histo", {}).get("results")
    path = Path(root, written or f"results/paper/{run}.json")
    return json.loads(path.read_text("utf8")) if path.exists() else None


def experiments(notebook, runs, profile, root=Path()):
    """Write the table of a chapter's experiments, and the results of each."""
    lines, tables = ["| experiment | data | run |", "|---|---|---|"], []
    for run in runs:
        path = Path(root, "_build/executed", profile, f"{run}.ipynb")
        name, copy, why = run.partition(".")[2] or run, None, ""
        try:
            copy = read_copy(path, notebook)
        except UnusableCopy as error:
            why = f"; not shown: {error}".replace(f"{root}/", "") * path.exists()
        made = results_of(run, copy, root)
        link = f"{{doc}}`{name} </{page_of(run)}>`" if copy else f"`{name}`"
        if made is None:
            lines.append(f"| {link} | | not run: `make paper EXPERIMENT={run}`{why} |")
            continue
        by = made["provenance"]
        by = by | {"dirty": by.get("uncommitted_changes")}
        when = facts(by, by.get("seconds"), by.get("profile", profile))
        data = ", ".join(titles(by.get("data", {}), root))
        lines.append(f"| {link} | {data} | {when} {by.get('device', '')}{why} |")
        if isinstance(made.get("table"), list) and made["table"]:
            tables += ["", f"`{name}`:", "", *markdown(made["table"])]
    return "\n".join(lines + tables)


def markdown(rows):
    """Write records as lines of a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def line(values):
        return "| " + " | ".join(str(v).replace("|", "\\|") for v in values) + " |"

    cells = [["" if (v := row.get(c)) is None else v for c in columns] for row in rows]
    cells = [[f"{v:.4g}" if isinstance(v, float) else v for v in row] for row in cells]
    return [line(columns), "|" + "---|" * len(columns), *map(line, cells)]


def without_run(notebook, runs, profile, root=Path()):
    """Show a chapter that has no run of its own in a profile: prose and code."""
    title, text = f"This chapter has no run in the profile {profile}", (
        "The chapter's code is shown without outputs; numbers in its prose are those "
        "of the committed results on real tissue."
    )  # fmt: skip
    if runs:
        title = "The paper's own experiments"
        text = f"{experiments(notebook, runs, profile, root)}\n\n{text}"
    box = f"\n:::{{admonition}} {title}\n:class: edition\n\n{text}\n:::\n"
    cells = []
    for cell in notebook["cells"]:
        cells.append(cell)
        if name := cell["metadata"].get("mystnb", {}).get("figure", {}).get("name"):
            # What refers to the figure finds a place that says why it is empty.
            figure = f":::{{figure}} {NOT_RUN}\n:name: {name}\n:alt: Not run\n\n"
            figure += f"Not run in the profile `{profile}`.\n:::\n"
            cells.append({"cell_type": "markdown", "metadata": {}, "source": figure})
    return with_box({**notebook, "cells": cells}, box)


def add_status(notebook, profile, root=Path()):
    """Put the status box right below the title."""
    return with_box(notebook, status(notebook["metadata"], profile, root))


def with_box(notebook, box):
    """Put a box right below the title."""
    for cell in notebook["cells"]:
        text = source_text(cell)
        title = re.search(r"^# .*$", text, re.MULTILINE)
        if cell["cell_type"] == "markdown" and title:
            cell["source"] = text[: title.end()] + "\n" + box + text[title.end() :]
            return notebook
    raise UnusableCopy("it has no title (`# ...`) to put its status below")


def executed(app, docname, text):
    """Return the text of a notebook page: the source with its executed outputs."""
    profile, chapter = app.config.histo_profile, Path(docname).name
    root, notebook = Path(app.srcdir), json.loads(text)
    runs = runs_of(chapter, profile, root)
    for run in runs:
        path = root / "_build/executed" / profile / f"{run}.ipynb"
        committed = root / "results/paper" / f"{run}.json"
        for dependency in (path, path.with_suffix(".failed.ipynb"), committed):
            app.env.note_dependency(str(dependency))
    if runs != [chapter]:
        return json.dumps(without_run(notebook, runs, profile, root))
    try:
        copy = read_copy(path, notebook)
        return json.dumps(add_status(with_outputs(notebook, copy), profile, root))
    except UnusableCopy as why:
        logger.warning(
            "cannot show this chapter: %s (to fix it: make book PROFILE=%s)",
            str(why).replace(f"{app.srcdir}/", ""),
            profile,
            location=docname,
        )
        return text


def on_source_read(app, docname, source):
    """Swap the text of a page while Sphinx reads it."""
    source[0] = source[0].replace(COLAB_BADGE, LOCAL_BADGE)
    if app.env.doc2path(docname).endswith(".ipynb") and "experiments/" not in docname:
        source[0] = executed(app, docname, source[0])


def no_launch(app, pagename, templatename, context, doctree):
    """Leave out buttons that would open an experiment's page in the repository."""
    if pagename.startswith("experiments/"):
        context["page_source_suffix"] = ".md"


def copy_atlas(app, exception):
    """Put the atlas of this profile beside the pages; without one, do nothing."""
    made = Path(app.srcdir) / "_build/atlas" / app.config.histo_profile / "atlas.html"
    if exception is None and made.exists():
        shutil.copyfile(made, Path(app.outdir) / "atlas.html")


def setup(app):
    """Register with Sphinx."""
    app.add_config_value("histo_profile", os.environ.get("PROFILE", "demo"), "env")
    app.connect("config-inited", add_results)
    app.connect("source-read", on_source_read)
    app.connect("html-page-context", no_launch, priority=100)
    app.connect("build-finished", copy_atlas)
    return {"version": "1", "parallel_read_safe": True}
