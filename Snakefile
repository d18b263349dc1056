# The chapters as a DAG: one papermill run per notebook; only what changed runs again.
#
#     snakemake --cores 2 -q host rules progress --keep-going --config profile=tissue
#
# `make book` calls it. Chapters load or make what they need, so none waits for another
# but 09, which compares the encoders that others trained, and 11, which takes 06's.

import sys
from pathlib import Path

PROFILE = config.get("profile", "demo")
CHAPTERS = [path.stem for path in sorted(Path("notebooks").glob("[0-9][0-9]_*.ipynb"))]


def profile_file(wildcards):
    """The chapter's parameters in this profile; demo chapters have none."""
    return sorted(Path("profiles", wildcards.profile).glob(f"{wildcards.chapter}.yaml"))


def trained_before(wildcards):
    """Chapter 09 compares the encoders that 04 to 08 saved, 11 takes 06's vectors."""
    needed = {"09": ("04", "05", "06", "07", "08"), "11": ("06",)}
    before = needed.get(wildcards.chapter[:2], ())
    papers = [name for name in CHAPTERS if name[:2] in before]
    return expand("_build/executed/{profile}/{chapter}.ipynb", profile=wildcards.profile, chapter=papers)


rule all:
    input:
        expand("_build/executed/{profile}/{chapter}.ipynb", profile=PROFILE, chapter=CHAPTERS),


rule chapter:
    input:
        "tools/run_notebook.py",
        profile_file,
        trained_before,
        notebook="notebooks/{chapter}.ipynb",
        package=sorted(Path("histo_utils").rglob("*.py")),
    output:
        "_build/executed/{profile}/{chapter}.ipynb",
    wildcard_constraints:
        chapter=r"\d\d_[^/.]+",
    params:
        python=sys.executable,
    shell:
        "{params.python:q} {input[0]} {wildcards.chapter} --profile {wildcards.profile} --out {output}"
