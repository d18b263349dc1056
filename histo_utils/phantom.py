"""Synthetic H&E-like slides with known nuclei and tissue: the data of ``demo``.

Nothing here is tissue and nothing measured on it is evidence about tissue. Every
chapter runs on it on a fresh machine, against a known truth and a known confounder:
each site stains in its own way, and every class is at both.

Lengths are in µm unless a name says otherwise. Architecture lies on a coarse grid (one
node per ``PITCH`` µm), nuclei are analytic ellipses, and both meet at level-0 pixels in
Beer-Lambert optics: light = white · exp(-(h · H + e · E)).
"""

import json
import os
import platform
from collections import namedtuple
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import tifffile
from PIL import Image
from scipy import ndimage
from skimage.measure import block_reduce
from skimage.morphology import remove_small_holes

from histo_utils.textures import DRAW, PITCH, enlarge, look_up, noise

GENERATOR = "histo_utils.phantom 2"  # raise the number when anything changes
CLASSES = tuple(DRAW)
MASK_MPP = 4.0  # µm/px of the tissue masks
MARGIN = 96  # px around the nuclear map, so that no nucleus needs clipping


# A site's stain: optical density per unit of dye (R, G, B), and its light.
Stain = namedtuple("Stain", "haematoxylin eosin white")
SITES = {
    "A": Stain((0.74, 0.78, 0.30), (0.05, 0.60, 0.20), (243, 242, 245)),
    "B": Stain((0.66, 0.92, 0.54), (0.06, 0.80, 0.62), (246, 242, 231)),
}
PENS = {"green": (2.8, 0.9, 1.4), "blue": (2.7, 1.7, 0.5), "black": (2.6, 2.5, 2.3)}
# The plan repeats every 24 scans. Pens, folds and 40x scans meet every class.
PEN_AT = {1: "green", 6: "blue", 11: "black", 20: "green"}
FOLD_AT = {4, 10, 21}
PALE_AT = {3}
FORTY_AT = {7, 8, 13, 18}


# Plan of one scan; a row of the slide table without its files.
Scan = namedtuple(
    "Scan", "slide patient label site preparation mpp objective pen folded pale"
)


def plan_scan(index):
    """Plan scan `index`; 24 scans are 16 patients of 4 classes at 2 sites, crossed."""
    # The first patient of each class and site has 2 scans; scan 24 starts new patients.
    turn, place = divmod(index, 24)
    cell, repeat = place % 8, place // 8
    patient = turn * 16 + cell * 2 + repeat % 2
    mpp = 0.25 if place in FORTY_AT else 0.5
    return Scan(
        slide=f"phantom_{index:03d}", patient=f"P{patient:03d}",
        label=CLASSES[cell % 4], site="AB"[cell // 4], preparation="FFPE",
        mpp=mpp, objective=round(10 / mpp), pen=PEN_AT.get(place, "none"),
        folded=place in FOLD_AT, pale=place in PALE_AT,
    )  # fmt: skip


def _band(x, y, centre, turn, half, reach, curve, blur):
    """Curved stroke (0-1), `half` and `reach` its half width and length; its axes."""
    along = (x - centre[0]) * np.cos(turn) + (y - centre[1]) * np.sin(turn)
    across = -(x - centre[0]) * np.sin(turn) + (y - centre[1]) * np.cos(turn)
    inside = np.minimum(half - np.abs(across + curve * along**2), reach - np.abs(along))
    return np.clip(inside / blur + 0.5, 0, 1), along, across


def _draw(scan, index, seed):
    """Make a whole scan on the coarse grid, in the order tissue, stain, fold, pen."""
    rng = np.random.default_rng([seed, 0, index])
    # Scans of one patient share nuclear size, spacing and staining habit.
    own = np.random.default_rng([seed, 1, int(scan.patient[1:])])
    less = 0.78 if scan.mpp < 0.5 else 1.0  # 40x scans have four times the pixels
    # Units of 8 nodes, 16 µm: level-0 sizes divide by 16, tissue masks are whole.
    sizes = [size * less * rng.uniform(0.92, 1.08) for size in (1000, 1300)]
    shape = [round(size / PITCH / 8) * 8 + 1 for size in sizes]
    y, x = (np.mgrid[0 : shape[0], 0 : shape[1]] * PITCH).astype(np.float32)
    mx, my = x.max() / 2, y.max() / 2
    # One side is rich in nuclei and the other poor, with a wandering border.
    turn = rng.uniform(0, 2 * np.pi)
    slope = (x - mx) / mx * np.cos(turn) + (y - my) / my * np.sin(turn)
    rich = np.clip(0.55 + 0.75 * slope + 0.16 * noise(rng, shape, 45), 0, 1)
    texture = DRAW[scan.label](rng, own, x, y, rich)
    tilt = rng.uniform(-0.2, 0.2)
    u, v = (x - mx) + tilt * (y - my), (y - my) - tilt * (x - mx)
    far = (np.abs(u / mx) ** 3 + np.abs(v / my) ** 3) ** (1 / 3)
    ragged = 30 * noise(rng, shape, 40) + 7 * noise(rng, shape, 9)
    solid = np.minimum(texture.solid, (0.86 - far) * min(mx, my) + ragged)
    # Dyes vary over the slide and from field to field, and each on its own.
    habit = np.exp(own.normal(0, 0.05, 2) + rng.normal(0, 0.04, 2))
    habit *= 0.42 if scan.pale else 1.0
    dyes = [
        share * (1 + 0.06 * noise(rng, shape, 60) + 0.04 * noise(rng, shape, 8))
        for share in habit
    ]
    fold = pen = None
    if scan.folded:
        spot = np.array([mx, my]) * rng.uniform(0.8, 1.2, 2)
        bend = rng.uniform(-4e-4, 4e-4)
        turn = rng.uniform(0, np.pi)
        fold, _, across = _band(x, y, spot, turn, rng.uniform(16, 26), 380, bend, 5)
        fold *= 1 + 0.2 * noise(rng, shape, 6) + 0.1 * np.sin(across / 4)
    if scan.pen != "none":
        # Near a corner, where the tissue's edge leaves glass to both sides.
        turn = (rng.integers(4) + 0.5) * np.pi / 2 + rng.uniform(-0.25, 0.25)
        edge = np.array([mx, my]) * (1 + 0.92 * np.array([np.cos(turn), np.sin(turn)]))
        slant = turn + np.pi / 2 + rng.uniform(-0.35, 0.35)
        bend = rng.uniform(4e-4, 9e-4)
        pen, along, across = _band(x, y, edge, slant, 55, 300, bend, 14)
        streak = ndimage.gaussian_filter1d(rng.standard_normal(4096), 3)
        lane = ((across + bend * along**2) / 3).astype(int) % len(streak)
        pen *= 1 + 0.18 * streak[lane] / streak.std()
        pen = np.clip(pen * (1 + 0.1 * noise(rng, shape, 10)), 0, 1.4)
    return rng, texture, solid.astype(np.float32), dyes, fold, pen


def _stamp(nuclei, shape, mpp):
    """Put nuclei (µm) on a pixel canvas: chromatin density and the true mask."""
    canvas = np.zeros([n + 2 * MARGIN for n in shape], np.float32)
    mask = np.zeros(canvas.shape, bool)
    nuclei = nuclei[np.argsort(nuclei[:, 2])].astype(np.float32)
    for start in range(0, len(nuclei), 256):  # chunks of similar size stay in cache
        cell = nuclei[start : start + 256, :, None, None]
        x, y, long, short, angle, bend, dark, rim, soft = cell.swapaxes(0, 1)
        reach = int(np.ceil((long.max() * 1.15 + 0.8) / mpp))
        step = np.arange(-reach, reach + 1, dtype=np.float32)
        col, row = np.floor(x / mpp), np.floor(y / mpp)
        dx = (col + step + 0.5) * mpp - x
        dy = (row + step[:, None] + 0.5) * mpp - y
        u = (dx * np.cos(angle) + dy * np.sin(angle)) / long
        v = (dy * np.cos(angle) - dx * np.sin(angle) + bend * (u * long) ** 2) / short
        square = u * u + v * v
        # A lobe three times around keeps nuclei from being perfect ellipses.
        lobe = (u * (u * u - 3 * v * v) + 0.8 * u * v) / (square + 0.2)
        radius = np.sqrt(square) + (0.9 - soft) * 0.17 * lobe
        edge = np.clip((1 - radius) * short / soft + 0.5, 0, 1)
        tone = dark * edge * (1 - rim + rim * np.minimum(radius, 1) ** 3)
        # Whole numbers above 2**24 do not fit float32: convert before multiplying.
        place = (row + MARGIN + step[:, None]).astype(np.intp) * canvas.shape[1]
        place = place + (col + MARGIN + step).astype(np.intp)
        np.maximum.at(canvas.reshape(-1), place.ravel(), tone.ravel())
        mask.reshape(-1)[place[radius < 1]] = True
    inside = slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN)
    return canvas[inside], mask[inside]


def _render(scan, index, seed):
    """Render a scan to (H, W, 3) uint8, its nuclei and its tissue mask (bool)."""
    rng, texture, solid, dyes, fold, pen = _draw(scan, index, seed)
    factor = round(PITCH / scan.mpp)
    height, width = ((n - 1) * factor for n in solid.shape)
    nuclei = texture.nuclei
    kept = look_up(solid, nuclei[:, :2]) > 0.8 * nuclei[:, 3]
    far = nuclei[:, :2] / scan.mpp
    kept &= ((far >= 0) & (far < (width, height))).all(1)
    chromatin, truth = _stamp(nuclei[kept], (height, width), scan.mpp)
    gains = [dye * (1 if fold is None else 1 + 0.85 * fold) for dye in dyes]
    dyed = texture.haematoxylin * gains[0], texture.eosin * gains[1]
    coarse = [solid, *dyed, gains[0]]
    light = 1 + 0.012 * noise(rng, solid.shape, 120)
    grain = [rng.standard_normal((512, 512), dtype=np.float32) for _ in range(5)]
    for k, scale in enumerate((0.45, 0.9)):  # µm: chromatin, cytoplasm
        grain[k] = ndimage.gaussian_filter(grain[k], scale / scan.mpp, mode="wrap")
        grain[k] /= grain[k].std()
    tiles = -(-width // 512)
    stain = SITES[scan.site]
    image = np.empty((height, width, 3), np.uint8)
    rows = 64 // factor  # of the coarse grid: bands of 64 px stay in cache
    for top in range(0, solid.shape[0] - 1, rows):
        n = min(rows, solid.shape[0] - 1 - top)
        here = slice(top * factor, (top + n) * factor)
        speck = [g[here.start % 512 :][: n * factor] for g in grain]
        speck = [np.tile(g, tiles)[:, :width] for g in speck]
        depth, blue, pink, gain = (enlarge(f, factor, top, n) for f in coarse)
        cover = np.clip(depth / 1.2 + 0.5, 0, 1)
        truth[here] &= cover > 0.5
        body = chromatin[here] * cover
        h = blue * cover * (1 + 0.3 * speck[1]) + body * gain * (1 + 0.22 * speck[0])
        e = pink * cover * (1 + 0.1 * speck[1]) * (1 - 0.55 * np.minimum(body, 1))
        if pen is not None:
            ink = enlarge(pen, factor, top, n)
            truth[here] &= ink < 0.5
        lamp = enlarge(light, factor, top, n)
        for c in range(3):
            density = h * stain.haematoxylin[c] + e * stain.eosin[c]
            if pen is not None:
                density += ink * PENS[scan.pen][c]
            value = lamp * stain.white[c] * np.exp(-density) + 1.6 * speck[2 + c]
            image[here, :, c] = np.clip(value + 0.5, 0, 255)

    # Tissue: stained ground without opaque pen; lumina below 5000 µm² are filled.
    def share(nodes):
        return block_reduce(nodes[:-1, :-1], round(MASK_MPP / PITCH), np.mean)

    stained = share(solid > 0) >= 0.5
    stained = ndimage.binary_closing(np.pad(stained, 2), iterations=2)[2:-2, 2:-2]
    tissue = remove_small_holes(stained, max_size=int(5000 / MASK_MPP**2))
    if pen is not None:
        tissue &= share(pen < 0.5) >= 0.5
    return image, truth, tissue


def _shrink(image):
    """Reduce an image four times by averaging; cut to whole blocks."""
    image = image[: len(image) // 4 * 4, : image.shape[1] // 4 * 4]
    tall = sum(image[k::4].astype(np.uint16) for k in range(4))
    return ((sum(tall[:, k::4] for k in range(4)) + 8) // 16).astype(np.uint8)


def _publish(path, write):
    """Call `write` on a temporary name, then rename: `path` is never partial."""
    # The name carries machine and process: two runs may fill one folder at once.
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_tiff(image, mpp, path):
    """Write a tiled JPEG pyramid, reduced 4 and 16 times, that OpenSlide opens."""
    options = {
        "tile": (256, 256), "photometric": "rgb", "subsampling": (2, 2),
        "compression": "jpeg", "compressionargs": {"level": 85},
        "resolutionunit": "CENTIMETER", "metadata": None, "software": GENERATOR,
        "maxworkers": 1,
    }  # fmt: skip
    with tifffile.TiffWriter(path) as tiff:
        for level in range(3):
            image = _shrink(image) if level else image
            note = None if level else "Synthetic phantom: not tissue"
            tiff.write(
                image, subfiletype=int(level > 0), description=note,
                resolution=(1e4 / (mpp * 4**level),) * 2, **options,
            )  # fmt: skip


def _files(slide):
    """Name the files of one scan; the image comes last and marks the scan as done."""
    masks = {
        f"{kind}_mask": f"{kind}_masks/{slide}.png" for kind in ("nuclei", "tissue")
    }
    return {**masks, "file": f"images/{slide}.tif"}


def _write_scan(folder, index, seed):
    """Write scan `index` unless it is there."""
    scan = plan_scan(index)
    nuclei_mask, tissue_mask, file = (folder / f for f in _files(scan.slide).values())
    if nuclei_mask.exists() and tissue_mask.exists() and file.exists():
        return
    image, nuclei, tissue = _render(scan, index, seed)
    _publish(nuclei_mask, lambda part: Image.fromarray(nuclei).save(part, "PNG"))
    _publish(tissue_mask, lambda part: Image.fromarray(tissue).save(part, "PNG"))
    _publish(file, lambda part: _write_tiff(image, scan.mpp, part))


def _claim(folder, n_scans, seed):
    """Note in ``phantom.json`` what the folder will hold, or check what it holds."""
    wanted = {"generator": GENERATOR, "n_scans": n_scans, "seed": seed}
    note = folder / "phantom.json"
    if note.exists():
        try:
            found = json.loads(note.read_text())
        except ValueError:
            found = "an unreadable phantom.json"
    elif (folder / "slides.csv").exists():
        found = "a slides.csv without phantom.json, so another archive"
    else:
        text = json.dumps(wanted, indent=1) + "\n"
        return _publish(note, lambda part: part.write_text(text))
    if found != wanted:
        raise ValueError(
            f"{folder} holds {found}, but {wanted} was wanted; pass another folder, or "
            "delete this one to generate it anew"
        )


def write_phantom_archive(folder, n_scans=24, seed=0) -> pd.DataFrame:
    """Write synthetic H&E-like slides with known nuclei and tissue.

    Four textures (`label`) x two sites with their own stains x patients. Scan i depends
    on (`seed`, i) only. A run that was stopped goes on: scans that are there are kept.

    Parameters
    ----------
    folder : path-like
        Where to write; made if missing.
    n_scans : int
        Number of scans; the design is balanced at 24 and repeats with new patients.
    seed : int
        Seed of everything, at least 0.

    Returns
    -------
    pandas.DataFrame
        The slide table, also ``slides.csv``, which is written last: `file`, `slide`,
        `patient`, `label`, `site`, `preparation`, `mpp` (µm/px at level 0),
        `objective`, `pen` (a colour or ``"none"``), `folded`, `pale`, `nuclei_mask`
        (1-bit PNG of level-0 size) and `tissue_mask` (1-bit PNG, 4 µm/px), relative to
        `folder`. Tissue is stained ground, folds too; white ground, open clefts, lumina
        of 5000 µm² or more and opaque pen (half of full ink or more) are not.

    Raises
    ------
    ValueError
        If the folder holds another archive, or `n_scans` or `seed` is out of range.
    """
    for name, value, least in (("n_scans", n_scans, 1), ("seed", seed, 0)):
        if value != int(value) or value < least:
            raise ValueError(f"{name}={value}: pass a whole number of {least} or more")
    folder, n_scans, seed = Path(folder), int(n_scans), int(seed)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, n_scans, seed)
    for index in range(n_scans):
        _write_scan(folder, index, seed)
    for part in folder.rglob(f".*.{platform.node()}.*.part"):
        if not psutil.pid_exists(int(part.suffixes[-2][1:])):  # left by a killed run
            part.unlink(missing_ok=True)
    table = pd.DataFrame([plan_scan(index) for index in range(n_scans)])
    table = table.join(pd.DataFrame([_files(slide) for slide in table["slide"]]))
    table = table[["file", *Scan._fields, "nuclei_mask", "tissue_mask"]]
    _publish(folder / "slides.csv", lambda part: table.to_csv(part, index=False))
    return table
