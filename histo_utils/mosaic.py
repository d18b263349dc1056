"""Choose the few patches that stand for a slide: Yottixel's mosaic, KimiaNet's filter.

Yottixel is patented (US10628736B2); see the README before commercial use.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage
from sklearn.cluster import KMeans

from histo_utils import provenance
from histo_utils.jobs import run_batch
from histo_utils.slides import open_slide, patch_grid, without_ink
from histo_utils.stains import cellularity, nuclei_threshold

COLOUR_MPP = 2.0  # µm per pixel at which Yottixel takes a patch's mean colour (5×)
FIT_PATCHES = 16  # of a mosaic; stain vectors and threshold are fitted on these
REPORT_COLUMNS = (
    "slide", "status", "resumed", "mpp", "mpp_source", "patches", "mosaic",
    "high_cellularity", "megapixels", "seconds", "peak_mb", "message",
)  # fmt: skip


def yottixel_tissue(image):
    """Tissue mask (h, w) of Yottixel's released code; of a thumbnail within 500 px."""
    pixels = image.astype(np.float32)
    pixels[pixels.std(-1) < 5] = 255
    density = -np.log(np.maximum(pixels / 255, np.finfo(np.float32).eps))
    mean = np.maximum(density.mean(-1), np.finfo(np.float32).eps)
    # c_y of the hue-saturation-density model
    c_y = (density[..., 1] - density[..., 2]) / (np.sqrt(3) * mean)
    smooth = ndimage.uniform_filter(c_y, 30, mode="mirror")
    return (smooth >= 0.05) & (pixels.mean(-1) != 255)


def mean_colours(slide, patches):
    """Add mean red, green and blue, 0–1, as columns ``r g b``; read at 2 µm/px."""
    colours = np.empty((len(patches), 3))
    for i, row in enumerate(patches.itertuples(index=False)):
        coarse = max(COLOUR_MPP, row.mpp)
        side = max(1, round(row.size * row.mpp / coarse))
        colours[i] = slide.read(row.x, row.y, side, coarse).mean((0, 1)) / 255
    return patches.assign(**dict(zip("rgb", colours.T, strict=True)))


def yottixel_mosaic(patches, n_clusters=9, fraction=0.05, seed=0):
    """Choose a share of the patches, spread over colours and, inside those, over space.

    k-means on the mean colours gives at most ``n_clusters`` clusters; from a cluster
    of n patches max(1, ⌊n · fraction⌋) are taken: as many k-means clusters of the
    places, and nearest to each centre, in order, the patch not yet taken. As in the
    code that Kalra et al. (Medical Image Analysis 65, 2020, 101757) released.

    Parameters
    ----------
    patches : pandas.DataFrame
        With ``x``, ``y`` and the mean colour ``r``, ``g``, ``b`` in 0–1.
    n_clusters : int
        Colour clusters (Yottixel: 9).
    fraction : float
        Share taken of each cluster (released code: 0.05; an older notebook: 0.15).
    seed : int
        Of both k-means. The same table and seed give the same mosaic.

    Returns
    -------
    pandas.DataFrame
        The chosen rows with their index, cluster by cluster, and the column
        ``colour_cluster``. Equal distances are decided by row order.

    Raises
    ------
    ValueError
        Missing columns, NaN colours, parameters out of range.
    """
    missing = [name for name in "xyrgb" if name not in patches.columns]
    if missing:
        raise ValueError(
            f"the patches have no column {', '.join(missing)}; mosaic.mean_colours "
            "adds r, g, b"
        )
    if not 0 < fraction <= 1 or n_clusters < 1:
        raise ValueError(
            f"fraction={fraction}, n_clusters={n_clusters} were given; expected "
            "0 < fraction ≤ 1 and n_clusters ≥ 1"
        )
    if patches.empty:
        return patches.assign(colour_cluster=pd.Series(dtype=int))
    colours = patches[["r", "g", "b"]].to_numpy(float)
    places = patches[["y", "x"]].to_numpy(float)
    if np.isnan(colours).any():
        row = patches.index[np.isnan(colours).any(1)][0]
        raise ValueError(f"row {row} has no mean colour (NaN); drop or recompute it")
    cluster = _kmeans(colours, min(n_clusters, len(patches)), seed).labels_
    chosen = []
    for colour in range(cluster.max() + 1):
        members = np.flatnonzero(cluster == colour)
        # Rounded before the floor: 100 · 0.29 is 28.999… in floating point.
        wanted = max(1, int(round(len(members) * fraction, 9)))
        spread = _kmeans(places[members], wanted, seed)
        distances, taken = spread.transform(places[members]).round(6), []
        for centre in range(wanted):
            # A stable sort: patches equally near are taken in row order.
            order = np.argsort(distances[:, centre], kind="stable")
            taken.append(next(i for i in order if i not in taken))
        chosen.extend(members[taken])
    return patches.iloc[chosen].assign(colour_cluster=cluster[chosen])


def _kmeans(points, n_clusters, seed):
    """k-means that does not mind fewer distinct points than clusters (flat colours)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Number of distinct clusters")
        return KMeans(n_clusters, random_state=seed, n_init="auto").fit(points)


def high_cellularity_mosaic(slide, mosaic, keep=0.2):
    """Score a mosaic's patches by nuclear area and keep the richest.

    Stain vectors and threshold are fitted once per slide, to 16 of its patches: fitted
    patch by patch, a patch without nuclei would find some.

    Parameters
    ----------
    slide : histo_utils.slides.Slide
    mosaic : pandas.DataFrame
        Patches of this slide: ``x``, ``y``, ``size``, ``mpp``.
    keep : float
        Share to keep, at least one patch. KimiaNet's published coordinates hold about
        one fifth of the mosaic for training slides; its code was not released.

    Returns
    -------
    pandas.DataFrame
        The mosaic with ``cellularity`` (0–1) and ``high_cellularity`` (bool); equal
        scores are decided by row order.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} was given; expected 0 < keep ≤ 1")
    if mosaic.empty:
        return mosaic.assign(cellularity=0.0, high_cellularity=False)

    def tissue_pixels(row):
        # A pen mark absorbs red as nuclei do: it would spoil the fit and count.
        return without_ink(slide.read(row.x, row.y, row.size, row.mpp), row.mpp)

    rows = list(mosaic.itertuples(index=False))
    places = np.linspace(0, len(rows) - 1, min(FIT_PATCHES, len(rows))).astype(int)
    fit = nuclei_threshold([tissue_pixels(rows[i]) for i in places], rows[0].mpp)
    if np.isinf(fit.threshold):
        warnings.warn(
            f"{slide.path.name}: nothing in the mosaic stands out as nuclei (too pale, "
            "or none there); cellularity is 0 everywhere, the first patches are kept",
            stacklevel=2,
        )
    scores = np.array([cellularity(tissue_pixels(row), row.mpp, fit) for row in rows])
    kept = np.zeros(len(rows), bool)
    n_kept = max(1, int(round(len(rows) * keep, 9)))
    kept[np.argsort(-scores, kind="stable")[:n_kept]] = True
    return mosaic.assign(cellularity=scores, high_cellularity=kept)


def slide_mosaic(
    slide, size=1000, mpp=0.5, overlap=0.0, min_tissue=0.7, n_clusters=9,
    fraction=0.05, keep=0.2, seed=0,
):  # fmt: skip
    """Go from one slide to its tissue patches with mosaic and cellularity marked.

    Parameters are those of `patch_grid`, `yottixel_mosaic` and
    `high_cellularity_mosaic`.

    Returns
    -------
    pandas.DataFrame
        Every tissue patch: ``x y size mpp tissue r g b``, ``in_mosaic`` (bool) and,
        inside the mosaic, ``colour_cluster``, ``cellularity``, ``high_cellularity``.
    """
    grid = patch_grid(slide, size, mpp, overlap, min_tissue=min_tissue)
    patches = mean_colours(slide, grid)
    mosaic = yottixel_mosaic(patches, n_clusters, fraction, seed)
    mosaic = high_cellularity_mosaic(slide, mosaic, keep)
    patches = patches.join(mosaic.drop(columns=patches.columns))
    patches["in_mosaic"] = patches.index.isin(mosaic.index)
    patches["high_cellularity"] = patches["high_cellularity"].eq(True)
    return patches


def extract_mosaics(slides, out, executor=None, progress=True, **parameters):
    """Extract the mosaics of many slides; a bad slide never stops the others.

    Each finished slide leaves ``<slide>.parquet`` (the table of `slide_mosaic` with
    ``image``, ``slide``, ``slide_mpp`` and the slide's own columns) and
    ``<slide>.json`` (its line of the report) in ``out``. Run again, slides that are
    finished with the same parameters are not repeated; failed ones are tried again.

    Parameters
    ----------
    slides : pandas.DataFrame
        One row per slide: ``image`` (path), and optionally ``slide`` (name; else the
        file's stem), ``slide_mpp`` (µm per pixel where the file lacks it), and any
        columns to carry along (patient, label, …).
    out, executor, progress
        As `jobs.run_batch`; ``parameters`` go to `slide_mosaic`.

    Returns
    -------
    pandas.DataFrame
        The report, one row per slide in the order given: `jobs.run_batch`'s columns
        (``status`` may also be ``"no tissue"``), ``slide``, ``mpp``, ``mpp_source``,
        ``patches``, ``mosaic``, ``high_cellularity``, and ``megapixels`` (of the tissue
        patches, at their own µm per pixel).
    """
    if slides.empty:
        raise ValueError("the slide table is empty; is the folder right?")
    if "image" not in slides:
        raise ValueError(f"the slide table has no column image; it has {list(slides)}")
    # Results of older code are not kept.
    shared = {"parameters": parameters, "code": provenance.code_hash("mosaic")[:16]}
    jobs = []
    for row in slides.to_dict("records"):
        image, mpp = str(row.pop("image")), row.pop("slide_mpp", None)
        name = str(row.pop("slide", None) or Path(image).stem)
        mpp = None if mpp is None or pd.isna(mpp) else float(mpp)
        jobs.append({"name": name, "image": image, "mpp": mpp, "carry": row, **shared})
    names = pd.Series([job["name"] for job in jobs])
    if names.duplicated().any():
        raise ValueError(
            f"two slides are called {names[names.duplicated()].iloc[0]!r}; give them "
            "different names in the column slide"
        )
    lines = run_batch(_write_mosaic, jobs, out, executor, progress)
    report = pd.DataFrame(lines).rename(columns={"name": "slide"})
    return report.reindex(columns=list(REPORT_COLUMNS))


def _write_mosaic(job, out):
    """Write one slide's table; return its line of the report."""
    with open_slide(job["image"], job["mpp"]) as slide:
        patches = slide_mosaic(slide, **job["parameters"])
    columns = {"image": job["image"], "slide": job["name"], "slide_mpp": slide.mpp}
    with provenance.new_file(out / f"{job['name']}.parquet") as part:
        patches.assign(**columns, **job["carry"]).to_parquet(part, index=False)
    line = {"mpp": slide.mpp, "mpp_source": slide.mpp_source, "patches": len(patches)}
    line["mosaic"] = int(patches["in_mosaic"].sum())
    line["high_cellularity"] = int(patches["high_cellularity"].sum())
    line["megapixels"] = round(float((patches["size"] ** 2).sum()) / 1e6, 2)
    if patches.empty:
        line["status"] = "no tissue"
        line["message"] = "no tissue patches found; the mosaic is empty"
    return line
