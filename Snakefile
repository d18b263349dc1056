# The chapters as a DAG: one papermill run per notebook; only what changed runs again.
#
#     snakemake --cores 2 -q host rules progress --keep-going --config profile=tissue
#
# `make book` calls it. Chapters load or make what they need, so none waits for another
# but 09, which compares the encoders that others trained, and 11, which takes 06's.
# In the profile paper a target is an experiment whose data are there (tools/paper.py):
# publishers' files are converted first, and 10 waits for 05's networks.

import sys
from pathlib import Path

sys.path.insert(0, "tools")
import paper
from run_notebook import names

PROFILE = config.get("profile", "demo")
OVERRIDE = config.get("override", "")
RUNS = [n for n in names(PROFILE) if PROFILE != "paper" or paper.can_run(n)]


def copies(profile, runs):
    return expand("_build/executed/{profile}/{name}.ipynb", profile=profile, name=runs)


def profile_file(wildcards):
    """The chapter's parameters in this profile; demo chapters have none."""
    return sorted(Path("profiles", wildcards.profile).glob(f"{wildcards.name}.yaml"))


def trained_before(wildcards):
    """Chapter 09 compares the encoders that 04 to 08 saved, 11 takes 06's vectors."""
    if wildcards.profile == "paper":
        found = [n for n in paper.before(wildcards.name) if paper.can_run(n)]
        return copies("paper", found)
    needed = {"09": ("04", "05", "06", "07", "08"), "11": ("06",)}
    before = needed.get(wildcards.name[:2], ())
    found = [n for n in names(wildcards.profile) if n[:2] in before]
    return copies(wildcards.profile, found)


def converted(wildcards):
    """What is made of a publisher's files before an experiment."""
    found = paper.to_convert(wildcards.name) if wildcards.profile == "paper" else ()
    return [paper.marker(name) for name in found]


rule all:
    input:
        copies(PROFILE, RUNS),


rule chapter:
    input:
        "tools/run_notebook.py",
        profile_file,
        trained_before,
        converted,
        OVERRIDE or [],
        notebook=lambda wildcards: f"notebooks/{wildcards.name.split('.')[0]}.ipynb",
        package=sorted(Path("histo_utils").rglob("*.py")),
    output:
        "_build/executed/{profile}/{name}.ipynb",
    wildcard_constraints:
        name=r"\d\d_[^/.]+(\.[^/.]+)?",
    params:
        python=sys.executable,
        override=f"--override {OVERRIDE}" if OVERRIDE else "",
    shell:
        "{params.python:q} {input[0]} {wildcards.name} --profile {wildcards.profile}"
        " --out {output} {params.override}"


# Publishers' files, made into what the chapters read; HISTO_DATA is only read.
rule convert:
    input:
        lambda wildcards: sum(paper.sources(wildcards.data).values(), []),
    output:
        str(paper.marker("{data}")),
    params:
        python=sys.executable,
        override=f"--override {OVERRIDE}" if OVERRIDE else "",
    shell:
        "{params.python:q} tools/paper.py convert {wildcards.data} {params.override}"
