"""``python -m histo_utils.collection SLIDES OUT``."""

from __future__ import annotations

import argparse
import functools
import sys
from concurrent.futures import BrokenExecutor

from histo_utils.collection.building import index_slides
from histo_utils.jobs import pool
from histo_utils.slides import SlideError


def main(arguments=None):
    """Run the command line; return its exit status.

    0: all went well; 1: some slides failed, without ``--allow-failures``; 2: nothing
    was indexed.
    """
    options = _options().parse_args(arguments)
    keywords = vars(options).copy()
    processes, allowed = keywords.pop("processes"), keywords.pop("allow_failures")
    try:
        if processes is None:
            done = index_slides(**keywords)
        else:
            with pool(processes) as executor:
                done = index_slides(**keywords, executor=executor)
    except BrokenExecutor:
        print(
            "error: a process died (out of memory?); finished slides are kept: run the "
            "same again with fewer --processes", file=sys.stderr
        )  # fmt: skip
        return 2
    except (OSError, ValueError, SlideError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_summary(done))
    failed = (done.report["status"] == "failed").any()
    return int(failed and not allowed)


def _options():
    parser = argparse.ArgumentParser(
        prog="python -m histo_utils.collection",
        description="Make a folder of slides searchable; run again to bring it up to "
        "date, or to go on after a stop.",
    )
    parser.add_argument("slides", help="folder of slides, perhaps with a slides.csv")
    parser.add_argument("out", help="folder for archive and atlas")
    add = functools.partial(parser.add_argument, metavar="")
    add("--encoder", default="mobilenetv2_100", help="as timm calls it")
    add("--weights", help="its file; else looked for in HISTO_WEIGHTS, then the hub")
    add("--mpp", type=float, help="µm per pixel of slides whose file holds none")
    add("--size", type=int, default=224, help="side of a patch, px (224)")
    add("--patch-mpp", type=float, default=0.5, help="its µm per pixel (0.5)")
    add("--fraction", type=float, default=0.05, help="share of patches kept (0.05)")
    add("--labels", help="CSV: slide or file, patient, label, preparation, site, mpp")
    add("--processes", type=int, help="slides worked on at once (one a core)")
    parser.add_argument(
        "--allow-failures", action="store_true", help="exit 0 though slides failed"
    )
    return parser


def _summary(done):
    """Lines that a run ends with."""
    report, size = done.report, done.megabytes_a_slide
    count = {"done": 0, "no tissue": 0, "failed": 0}
    count |= report["status"].value_counts().to_dict()
    said = report[report["message"] != ""]
    lines = list(said["slide"] + ": " + said["status"] + ": " + said["message"])
    speed = ""
    if done.worked_on:
        fresh = report[(report["status"] != "failed") & ~report["reused"]]
        speed = (
            f", {done.slides_an_hour:.0f} slides an hour "
            f"({fresh['seconds'].median():.1f} s a slide on its core)"
        )
    lines += [
        *done.notes,
        "",
        f"slides   {count['done']} done, {count['no tissue']} without tissue, "
        f"{count['failed']} failed; {report['reused'].sum()} reused from earlier runs",
        f"patches  {report['patches'].sum()} in the archive, of "
        f"{report['tissue_patches'].sum()} with tissue",
        f"time     {done.seconds:.1f} s for {done.worked_on} slides{speed}",
        f"size     {size:.2f} MB a slide in the archive",
        f"report   {done.archive.parent / 'report.csv'}",
        f"archive  {done.archive}",
        f"atlas    {done.atlas}",
        "search   with an image of your own (a square in its middle), in Python:",
        "  from histo_utils.collection import find",
        f"  print(find({str(done.archive.parent)!r}, 'image.png', mpp=0.5))",
    ]
    if count["failed"]:
        lines.append(
            "Failed slides are tried again by the next run. Without µm per pixel: give "
            "--mpp, or a column mpp in slides.csv or --labels. Damaged: copy them anew."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
