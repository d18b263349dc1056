"""Build a collection, or bring it up to date."""

from __future__ import annotations

import functools
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from histo_utils.collection.drawing import draw
from histo_utils.collection.listing import listed
from histo_utils.collection.upkeep import claim, clear, clear_begun, write
from histo_utils.collection.vectors import gather, vectors_of_slide
from histo_utils.embeddings import VECTORS
from histo_utils.encoders import frozen
from histo_utils.jobs import run_batch
from histo_utils.mosaic import extract_mosaics
from histo_utils.provenance import file_hash


class Indexed(NamedTuple):
    """What a run of `index_slides` did.

    Attributes
    ----------
    report : pandas.DataFrame
        One row a slide: ``slide``, ``status`` (``done``, ``no tissue``, ``failed``),
        ``reused``, ``mpp``, ``mpp_source``, ``tissue_patches``, ``patches`` (in the
        archive), ``seconds``, ``message``.
    archive, atlas : pathlib.Path
    seconds : float
        Of the whole run.
    notes : list of str
        What a reader of the archive must know: whose patient is a guess, ….
    """

    report: pd.DataFrame
    archive: Path
    atlas: Path
    seconds: float
    notes: list

    @property
    def worked_on(self):
        """Slides that this run finished itself."""
        fresh = (self.report["status"] != "failed") & ~self.report["reused"]
        return int(fresh.sum())

    @property
    def slides_an_hour(self):
        """Of this run, archive and atlas included."""
        return 3600 * self.worked_on / self.seconds

    @property
    def megabytes_a_slide(self):
        """Of the archive, for a slide in it; 1 MB is 10⁶ bytes."""
        size = sum(p.stat().st_size for p in self.archive.iterdir())
        return size / 1e6 / int((self.report["patches"] > 0).sum())


def index_slides(
    slides, out, *, encoder="mobilenetv2_100", weights=None, mpp=None, size=224,
    patch_mpp=0.5, fraction=0.05, labels=None, executor=None, progress=True,
) -> Indexed:  # fmt: skip
    """Make a folder of slides searchable, or bring its archive up to date.

    Slides that are finished are not repeated, new ones are added, and those no longer
    in the folder leave the archive and ``out``. The result does not depend on how
    often a run was stopped on the way.

    Parameters
    ----------
    slides : str or pathlib.Path
        A folder as `catalog.slide_table` takes it: slides, and perhaps a slides.csv.
    out : str or pathlib.Path
        Folder of this collection; made if missing.
    encoder, weights
        As `encoders.frozen` takes them.
    mpp : float, optional
        µm per level-0 pixel of the slides whose file holds none; the others keep
        theirs.
    size, patch_mpp : int, float
        Side of a patch in pixels and its µm per pixel.
    fraction : float
        Share of a slide's tissue patches that stands for it (`yottixel_mosaic`).
    labels : str or pathlib.Path, optional
        CSV with a column ``slide`` or ``file``, and any of ``patient label preparation
        site mpp``. It wins over slides.csv; an ``mpp`` here wins over the file's own.
    executor : concurrent.futures.Executor, optional
        As `run_batch`: a pool of one process a core if not given.
    progress : bool
        Show bars.

    Returns
    -------
    Indexed

    Raises
    ------
    FileNotFoundError
        No such folder, no slide in it, or no weights.
    ValueError
        ``out`` is another folder's collection, another run is at work in it, the labels
        fit no slide, or not one slide could be indexed.
    """
    start = time.perf_counter()
    slides, out = Path(os.path.abspath(slides)), Path(out)
    table, notes = listed(slides, mpp, labels)
    model = frozen(encoder, weights)
    note = {
        "slides": str(slides), "encoder": encoder, "weights": _text(weights),
        "fingerprint": model.fingerprint(), "size": int(size),
        "patch_mpp": float(patch_mpp), "fraction": float(fraction),
    }  # fmt: skip
    claim(out, note)
    names = table["slide"].tolist()
    clear(out / "mosaics", names, lambda name: f"{name}.parquet")
    clear(out / "vectors", names, lambda name: f"{name}/{VECTORS}")
    for folder in (out, out / "vectors"):
        clear_begun(folder)
    mosaics = extract_mosaics(
        table[["image", "slide", "slide_mpp"]], out / "mosaics", executor, progress,
        size=note["size"], mpp=note["patch_mpp"], fraction=note["fraction"],
    ).set_index("slide")  # fmt: skip
    jobs = [
        {
            "name": row.slide,
            "image": row.image,
            "mosaic": file_hash(out / "mosaics" / f"{row.slide}.parquet"),
            "encoder": note["fingerprint"],
        }
        for row in table.itertuples()
        if mosaics.loc[row.slide, "status"] == "done"
    ]
    work = functools.partial(vectors_of_slide, encoder, weights)
    lines = run_batch(work, jobs, out / "vectors", executor, progress)
    report = _report(mosaics, {line["name"]: line for line in lines})
    write(out / "report.csv", report.to_csv(index=False))
    done = table[table["slide"].isin(report.loc[report["patches"] > 0, "slide"])]
    if done.empty:
        shutil.rmtree(out / "archive", ignore_errors=True)
        (out / "atlas.html").unlink(missing_ok=True)
        reasons = "; ".join(report["slide"] + ": " + report["message"])
        raise ValueError(f"not one of {len(table)} slides could be indexed: {reasons}")
    archive = gather(done, out)
    archive.save(out / "archive")
    draw(archive, out, note, notes)
    seconds = time.perf_counter() - start
    return Indexed(report, out / "archive", out / "atlas.html", seconds, notes)


def _report(mosaics, lines):
    rows = []
    for slide, mosaic in mosaics.iterrows():
        line = lines.get(slide, {"resumed": True, "seconds": 0.0, "message": ""})
        said = filter(None, [mosaic["message"], line["message"]])
        rows.append(
            {
                "slide": slide,
                "status": line.get("status", mosaic["status"]),
                "reused": bool(mosaic["resumed"] and line["resumed"]),
                "mpp": mosaic["mpp"],
                "mpp_source": mosaic["mpp_source"],
                "tissue_patches": _count(mosaic["patches"]),
                "patches": line.get("patches", 0),
                "seconds": round(mosaic["seconds"] + line["seconds"], 2),
                "message": "; ".join(dict.fromkeys(said)),
            }
        )
    return pd.DataFrame(rows)


def _count(value):
    return 0 if pd.isna(value) else int(value)


def _text(path):
    return None if path is None else os.path.abspath(path)
