"""Write what Jupyter Book is to build: the contents, and a page for each experiment.

    python tools/experiment_pages.py paper

`make book` calls it. The contents, ``_build/toc.yml``, are ``_toc.yml``; in the profile
paper an experiment's executed copy stands below its chapter, ``experiments/<chapter>-
<experiment>.ipynb``: the chapter's prose with that run's outputs. Labels get the
experiment's name, because a book has each label once.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import yaml

sys.path.insert(0, "_ext")
import executed_notebooks as pages

LABELS = r"^\(([\w-]+)\)=|^\$\$ \(([\w-]+)\)|^:label: (\S+)|^:name: (\S+)"


def labels(notebook):
    """List the labels that a notebook's cells define."""
    found = []
    for cell in notebook["cells"]:
        text = pages.source_text(cell)
        if cell["cell_type"] == "markdown":
            for groups in re.findall(LABELS, text, re.MULTILINE):
                found += filter(None, groups)
        figure = cell["metadata"].get("mystnb", {}).get("figure", {})
        found += filter(None, [figure.get("name")])
    return sorted(set(found), key=len, reverse=True)


def relabelled(notebook, suffix):
    """Give all labels of a page a suffix, where they are defined and referred to."""
    known = "|".join(map(re.escape, labels(notebook))) or "(?!)"
    label = re.compile(rf"(?<![\w-])({known})(?![\w-])")

    def renamed(text):
        return label.sub(lambda match: f"{match[1]}-{suffix}", text)

    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = renamed(pages.source_text(cell))
        if "mystnb" in cell["metadata"]:
            kept = json.loads(renamed(json.dumps(cell["metadata"]["mystnb"])))
            cell["metadata"]["mystnb"] = kept
    return notebook


def page(run, profile):
    """Return an experiment's page, or None where its copy cannot be shown."""
    chapter, _, name = run.partition(".")
    notebook = json.loads(Path("notebooks", f"{chapter}.ipynb").read_text("utf8"))
    try:
        copy = pages.read_copy(
            Path("_build/executed", profile, f"{run}.ipynb"), notebook
        )
    except pages.UnusableCopy:  # the chapter's page says why
        return None
    suffix = name.lower().replace("_", "-")
    made = relabelled(pages.with_outputs(notebook, copy), suffix)
    for cell in made["cells"]:
        text = pages.source_text(cell)
        if cell["cell_type"] == "markdown":
            text = re.sub(r"^\[!\[Open in Colab.*\n+", "", text, flags=re.MULTILINE)
            cell["source"] = re.sub(r"\A(\([\w-]+\)=\n+)?# ", rf"\1# {name}: ", text)
    made["metadata"].pop("kernelspec", None)  # a page to read, not to launch
    return pages.add_status(made, profile)


def main(profile):
    """Write all pages and the contents of a profile."""
    contents = yaml.safe_load(Path("_toc.yml").read_text("utf8"))
    shutil.rmtree("experiments", ignore_errors=True)
    for chapter in [one for part in contents["parts"] for one in part["chapters"]]:
        runs = pages.runs_of(Path(chapter["file"]).name, profile)
        for run in [run for run in runs if "." in run]:
            if made := page(run, profile):
                path = Path(f"{pages.page_of(run)}.ipynb")
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps(made), "utf8")
                entry = {"file": pages.page_of(run), "title": run.partition(".")[2]}
                chapter.setdefault("sections", []).append(entry)
    Path("_build").mkdir(exist_ok=True)
    Path("_build/toc.yml").write_text(yaml.safe_dump(contents, sort_keys=False), "utf8")


if __name__ == "__main__":
    main(*sys.argv[1:])
