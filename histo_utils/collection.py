"""A collection: a folder of slides made searchable, and kept so as slides come and go.

``python -m histo_utils.collection SLIDES OUT`` goes from a folder of slides to mosaics,
vectors, an archive and an atlas. What is finished for a slide is not done again while
its file (path, size, time of change), the parameters and the encoder's weights stay the
same: a run that was stopped goes on, and a new slide costs one slide.

In ``OUT``::

    collection.json   whose slides these are, and what they were made with
    report.csv        one line a slide: done, no tissue or failed, and why
    mosaics/          the tissue patches of each slide
    vectors/          one folder a slide: the vectors of its mosaic, with its patches
    archive/          all of them, with patients and labels: Embeddings.load's folder
    atlas.html        the pictures
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import sys
import time
import warnings
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import psutil

from histo_utils import atomic
from histo_utils.atlas import atlas
from histo_utils.catalog import SLIDE_SUFFIXES, slide_table
from histo_utils.embeddings import TABLE, VECTORS, Embeddings, load_embeddings
from histo_utils.encoders import embed, frozen
from histo_utils.many_slides import pool, run_batch
from histo_utils.mosaic import extract_mosaics
from histo_utils.provenance import file_hash
from histo_utils.search import Archive
from histo_utils.slides import MissingScaleError, SlideError, open_slide

NOTE = "collection.json"
BATCH = 16  # patches; on two cores faster than 64
ATLAS_PATCHES = 20_000  # searched for the atlas; minutes, where all take hours
K = 8  # neighbours shown
NO_LABEL = "not labelled"
ATLAS_FACTS = ("atlas_of", "atlas_notes")  # of the note, kept from run to run
LABEL_COLUMNS = ("patient", "label", "preparation", "site", "mpp")


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
    table, notes = _slides(slides, mpp, labels)
    model = frozen(encoder, weights)
    note = {
        "slides": str(slides), "encoder": encoder, "weights": _text(weights),
        "fingerprint": model.fingerprint(), "size": int(size),
        "patch_mpp": float(patch_mpp), "fraction": float(fraction),
    }  # fmt: skip
    _claim(out, note)
    names = table["slide"].tolist()
    _clear(out / "mosaics", names, lambda name: f"{name}.parquet")
    _clear(out / "vectors", names, lambda name: f"{name}/{VECTORS}")
    for folder in (out, out / "vectors"):
        _clear_begun(folder)
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
    work = functools.partial(_vectors_of_slide, encoder, weights)
    lines = run_batch(work, jobs, out / "vectors", executor, progress)
    report = _report(mosaics, {line["name"]: line for line in lines})
    _write(out / "report.csv", report.to_csv(index=False))
    done = table[table["slide"].isin(report.loc[report["patches"] > 0, "slide"])]
    if done.empty:
        shutil.rmtree(out / "archive", ignore_errors=True)
        (out / "atlas.html").unlink(missing_ok=True)
        reasons = "; ".join(report["slide"] + ": " + report["message"])
        raise ValueError(f"not one of {len(table)} slides could be indexed: {reasons}")
    archive = _gather(done, out)
    archive.save(out / "archive")
    _draw(archive, out, note, notes)
    seconds = time.perf_counter() - start
    return Indexed(report, out / "archive", out / "atlas.html", seconds, notes)


def find(out, image, k=K, mpp=None):
    """Search a collection with an image of one's own.

    A square from the middle of the image is looked for, as wide in µm as the
    collection's patches, or the largest there is.

    Parameters
    ----------
    out : str or pathlib.Path
        Folder that `index_slides` made.
    image : str or pathlib.Path
        A PNG, JPEG, TIFF or slide.
    k : int
        Neighbours wanted.
    mpp : float, optional
        µm per pixel of the image; without it the file's own, else that of the
        collection's patches (with a warning).

    Returns
    -------
    pandas.DataFrame
        The k nearest patches, nearest first, with ``distance`` (cosine).
    """
    note = json.loads((Path(out) / NOTE).read_text("utf-8"))
    model = _encoder(note["encoder"], note["weights"], note["fingerprint"])
    query = embed(model, _query(Path(image), mpp, note), progress=False)
    gallery = load_embeddings(Path(out) / "archive")
    found = Archive(gallery).search(query.vectors, k)
    best = gallery.table.iloc[found.ids[0]].reset_index(drop=True)
    best.insert(0, "distance", found.distances[0])
    first = ["distance", "slide", "patient", "x", "y"]
    return best[[*first, *best.columns.difference(first, sort=False)]]


def _query(image, mpp, note):
    """Patch table of one row: the middle of an image."""
    try:
        known = open_slide(image, mpp)
    except MissingScaleError:
        warnings.warn(
            f"{image.name} holds no µm per pixel; it is taken to be at "
            f"{note['patch_mpp']:g}, like the collection's patches: pass mpp= if not",
            stacklevel=3,
        )
        known = open_slide(image, note["patch_mpp"])
    with known as slide:
        scale = note["patch_mpp"] / slide.mpp
        size = min(note["size"], int(min(slide.dimensions) / scale))
        x, y = (round((side - size * scale) / 2) for side in slide.dimensions)
    row = {"image": str(image), "x": x, "y": y, "size": size, "mpp": note["patch_mpp"]}
    own = {"slide": image.stem, "patient": image.stem, "slide_mpp": slide.mpp}
    return pd.DataFrame([{**row, **own}])


def _slides(folder, mpp, labels):
    """Slide table with what the CSV says, and notes on what is guessed or left out."""
    table = slide_table(folder, mpp)
    notes = []
    for name in ("slide", "patient"):
        table[name] = table[name].astype(str)
    if labels is not None:
        table, unused = _with_labels(table, Path(labels))
        if unused:
            notes.append(f"{unused} rows of {labels} name no slide of the folder")
    names = table["slide"]
    bad = [name for name in names if Path(name).name != name or name.startswith(".")]
    if bad:
        raise ValueError(
            f"a slide is called {bad[0]!r}; expected a name that can be a file's, "
            "without / and not beginning with a dot: change the column slide"
        )
    folders = {Path(image).parent for image in table["image"]} | {folder}
    listed = {os.path.abspath(image) for image in table["image"]}
    there = [p for place in folders if place.is_dir() for p in place.iterdir()]
    left = [p.name for p in there
            if p.suffix.lower() in SLIDE_SUFFIXES and str(p) not in listed]  # fmt: skip
    if left:
        notes.append(
            f"{len(left)} slides are not in slides.csv and were left out, the first is "
            f"{min(left)}: add a row each"
        )
    guessed = int((table["patient"] == table["slide"]).sum())
    if guessed:
        notes.append(
            f"no patient is known for {guessed} of {len(table)} slides: each counts as "
            "a patient of its own, so two slides of one patient can find each other; a "
            "column patient in slides.csv or --labels says better"
        )
    return table, notes


def _with_labels(table, path):
    """Lay a CSV's columns over a slide table; also count its rows without a slide."""
    # A source-site code is called NA; empty cells alone are missing.
    given = pd.read_csv(path, dtype=str, keep_default_na=False, na_values="")
    key = next((name for name in ("slide", "file") if name in given), None)
    if key is None:
        raise ValueError(
            f"{path} has the columns {', '.join(given)}; expected slide or file, and "
            f"any of {', '.join(LABEL_COLUMNS)}"
        )
    own = table["slide"]
    if key == "file":
        given["file"] = [Path(str(name)).name for name in given["file"]]
        own = pd.Series([Path(image).name for image in table["image"]])
    twice = given[key].duplicated()
    if twice.any():
        raise ValueError(
            f"{path}: {given.loc[twice, key].iloc[0]!r} has two rows; expected one row "
            "a slide"
        )
    known = given[key].isin(set(own))
    if not known.any():
        raise ValueError(
            f"{path}: no {key} in it is in the folder; it has {given[key].iloc[0]!r}, "
            f"the folder {own.iloc[0]!r}"
            if len(given)
            else f"{path} has no rows"
        )
    rows = given.set_index(key).reindex(own.to_numpy())
    for name in rows:
        values = rows[name].to_numpy()
        if name == "mpp":
            name, values = "slide_mpp", pd.to_numeric(values)
        before = table[name].to_numpy(object) if name in table else None
        table[name] = np.where(pd.isna(values), before, values)
    table["slide_mpp"] = table["slide_mpp"].astype(float)
    return table, int((~known).sum())


def _claim(out, note):
    """Note in ``out`` whose collection it is; refuse another's, or a run at work."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / NOTE
    if path.exists():
        before = json.loads(path.read_text("utf-8"))
        if before["slides"] != note["slides"]:
            raise ValueError(
                f"{out} is the collection of {before['slides']}, not of "
                f"{note['slides']}; give another folder, or remove this one"
            )
        note |= {key: before[key] for key in ATLAS_FACTS if key in before}
        run = before.get("running")
        if run is not None and run != _process() and _process(run[0]) == run:
            raise ValueError(
                f"another run (process {run[0]}) is at work in {out}; wait for it"
            )
    elif any(out.iterdir()):
        raise ValueError(f"{out} holds other files; give an empty or a new folder")
    note["running"] = _process()
    _write(path, json.dumps(note, indent=1))


def _process(number=None):
    """Return a process's number and start, which tell it from all others here."""
    try:
        process = psutil.Process(number)
        return [process.pid, process.create_time()]
    except psutil.NoSuchProcess:
        return None


def _clear(folder, names, product):
    """Remove what belongs to no slide, and the lines of slides whose work is gone."""
    for path in folder.iterdir() if folder.is_dir() else ():
        name = path.name
        if path.is_file():
            name = Path(name.removesuffix(".part")).stem
        if name not in names and not name.startswith("."):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in names:
        if not (folder / product(name)).exists():
            (folder / f"{name}.json").unlink(missing_ok=True)


def _clear_begun(folder):
    """Remove what killed runs had begun to save: ``.<name>.<process>.new``."""
    for path in folder.glob(".*.*.*"):
        if not psutil.pid_exists(int(path.suffixes[-2][1:])):
            shutil.rmtree(path)


def _vectors_of_slide(encoder, weights, job, out):
    """Embed a slide's mosaic, save it in ``out``: a piece of work for `run_batch`."""
    model = _encoder(encoder, weights, job["encoder"])
    patches = pd.read_parquet(out.parent / "mosaics" / f"{job['name']}.parquet")
    chosen = patches[patches["in_mosaic"]].drop(columns="in_mosaic")
    # Patients and labels are added when all is gathered: they may change by then.
    made = embed(model, chosen.assign(patient=job["name"]), batch_size=BATCH,
                 progress=False)  # fmt: skip
    (out / f"{job['name']}.json").unlink(missing_ok=True)  # it spoke for older vectors
    table = made.table.drop(columns="patient")
    table.attrs = {}  # holds seconds; the same work shall give the same bytes
    Embeddings(made.vectors, table).save(out / job["name"])
    return {"patches": len(made)}


@functools.lru_cache(maxsize=1)
def _encoder(name, weights, fingerprint):
    """Load the encoder once a process; it must be the one that was asked for."""
    model = frozen(name, weights)
    if model.fingerprint() != fingerprint:
        raise ValueError(
            f"{name}: the weights are not those that the run began with; were they "
            "replaced, or is HISTO_WEIGHTS another folder? Run again"
        )
    return model


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


def _gather(slides, out):
    """Embeddings of all slides in the table's order, with its columns."""
    parts = []
    for row in slides.drop(columns=["image", "slide_mpp"]).to_dict("records"):
        part = load_embeddings(out / "vectors" / row["slide"])
        parts.append(Embeddings(part.vectors, part.table.assign(**row)))
    table = pd.concat([part.table for part in parts], ignore_index=True)
    return Embeddings(np.concatenate([part.vectors for part in parts]), table)


def _draw(archive, out, note, notes):
    """Write the atlas, unless it is that of this archive already."""
    page = out / "atlas.html"
    files = [file_hash(out / "archive" / name) for name in (VECTORS, TABLE)]
    if note.get("atlas_of") != files or not page.exists():
        shown, exclude, said = _for_the_atlas(archive)
        hidden = 1 if exclude == "self" else shown.table["patient"].value_counts().max()
        k = min(K, len(shown) - int(hidden))
        if k < 1:
            page.unlink(missing_ok=True)
            notes.append("There is one patch: no atlas, since nothing could be found.")
            return
        atlas(
            shown, page, k=k, exclude=exclude, progress=False,
            title=f"Slides of {Path(note['slides']).name}",
            note=" ".join([f"Encoder: {note['encoder']}.", *said]),
        )  # fmt: skip
        note |= {"atlas_of": files, "atlas_notes": said}
    notes.extend(note.get("atlas_notes", []))
    _write(out / NOTE, json.dumps(note | {"running": None}, indent=1))


def _for_the_atlas(archive):
    """Patches that the atlas can show, what it leaves out of a search, and notes."""
    said = []
    step = -(-len(archive) // ATLAS_PATCHES)
    if step > 1:
        archive = archive.take(np.arange(0, len(archive), step))
        said.append(f"The atlas searches one patch in {step}.")
    table = archive.table
    label = table["label"] if "label" in table else pd.Series(None, table.index, object)
    label = label.fillna(NO_LABEL).astype(str)
    archive = Embeddings(archive.vectors, table.assign(label=label))
    if table["patient"].nunique() == 1:
        said.append("There is one patient: the atlas shows its own patches.")
        alike = Embeddings(archive.vectors, table.assign(label=NO_LABEL))
        return alike, "self", said
    patients = table["patient"].groupby(label).transform("nunique")
    if (patients > 1).all():
        return archive, "patient", said
    if table["patient"][patients > 1].nunique() < 2:
        said.append("Each label has one patient: the atlas does not show labels.")
        alike = Embeddings(archive.vectors, table.assign(label=NO_LABEL))
        return alike, "patient", said
    alone = sorted(label[patients == 1].unique())
    said.append(
        f"Labels of one patient are in the archive and not in the atlas: "
        f"{', '.join(alone)}."
    )
    return archive.take((patients > 1).to_numpy()), "patient", said


def _write(path, text):
    with atomic.new_file(path) as part:
        part.write_text(text, "utf-8")


def _text(path):
    return None if path is None else os.path.abspath(path)


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
