"""Synthetic H&E-like slides with known nuclei and tissue: the data of ``demo``.

Nothing here is tissue and nothing measured on it is evidence about tissue. The
archive exists so that every chapter runs on a fresh machine, against a known truth
and a known confounder: each site stains in its own way, and every class is at both.

Lengths are in µm unless a name says otherwise. Architecture is drawn on a coarse grid
(one node every ``PITCH`` µm), nuclei are analytic ellipses, and both meet at level-0
pixels in Beer-Lambert optics: light = white · exp(-(h · H + e · E)).
"""

import json
import os
import platform
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import psutil
import tifffile
from PIL import Image
from scipy import ndimage

GENERATOR = "histo_utils.phantom 2"  # raise the number when anything changes
CLASSES = ("glandular", "fibrous", "lymphoid", "papillary")
PITCH = 2.0  # µm between nodes of the coarse grid
MASK_MPP = 4.0  # µm/px of the tissue masks
TILE = 256
MARGIN = 96  # px around the nuclear map, so that no nucleus needs clipping


class Stain(NamedTuple):
    """How a site stains: optical density per unit of dye (R, G, B), and its light."""

    hematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    white: tuple[float, float, float]


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


class Scan(NamedTuple):
    """What is planned for one scan; a row of the slide table without its files."""

    slide: str
    patient: str
    label: str
    site: str
    preparation: str
    mpp: float
    objective: int
    pen: str
    folded: bool
    pale: bool


class Texture(NamedTuple):
    """One class drawn on the coarse grid, and its nuclei."""

    solid: np.ndarray  # (h, w) µm to the nearest lumen or cleft, negative inside it
    eosin: np.ndarray  # (h, w) dye outside nuclei
    hematoxylin: np.ndarray  # (h, w) dye outside nuclei
    nuclei: np.ndarray  # (n, 9): x y long short angle bend dark rim softness


def plan_scan(index: int) -> Scan:
    """Plan scan `index`: class, site and patient cycle so that all are crossed.

    Of 24 scans, 4 classes x 2 sites x 2 patients make 16 patients; the first patient
    of each class and site has 2 scans. From scan 24 on new patients follow.
    """
    turn, place = divmod(index, 24)
    cell, repeat = place % 8, place // 8
    patient = turn * 16 + cell * 2 + repeat % 2
    mpp = 0.25 if place in FORTY_AT else 0.5
    return Scan(
        slide=f"phantom_{index:03d}",
        patient=f"P{patient:03d}",
        label=CLASSES[cell % 4],
        site="AB"[cell // 4],
        preparation="FFPE",
        mpp=mpp,
        objective=round(10 / mpp),
        pen=PEN_AT.get(place, "none"),
        folded=place in FOLD_AT,
        pale=place in PALE_AT,
    )


def _enlarge(grid, factor, top=0, rows=None):
    """Interpolate linearly between nodes: `rows` intervals from row `top` on."""
    rows = len(grid) - 1 - top if rows is None else rows
    share = ((np.arange(factor, dtype=np.float32) + 0.5) / factor)[:, None]
    grid = grid[top : top + rows + 1].astype(np.float32)
    tall = grid[:-1, None] + (grid[1:] - grid[:-1])[:, None] * share
    tall = tall.reshape(rows * factor, -1, 1)
    wide = tall[:, :-1] + (tall[:, 1:] - tall[:, :-1]) * share[:, 0]
    return wide.reshape(rows * factor, -1)


def _noise(rng, shape, scale):
    """Draw smooth noise of unit deviation, `scale` in nodes."""
    step = max(1, int(scale / 2.5))
    small = rng.standard_normal([n // step + 2 for n in shape], dtype=np.float32)
    small = ndimage.gaussian_filter(small, scale / step, mode="wrap")
    small /= small.std()
    return (_enlarge(small, step) if step > 1 else small)[: shape[0], : shape[1]]


def _at(field, points):
    """Look up a coarse field at points (n, 2) in µm."""
    ij = np.rint(points / PITCH).astype(int)
    high = np.array(field.shape) - 1
    return field[np.clip(ij[:, 1], 0, high[0]), np.clip(ij[:, 0], 0, high[1])]


def _scatter(rng, shape, spacing, jitter):
    """Spread points over the grid: a shaken hexagonal lattice, like packed cells."""
    height, width = (n * PITCH for n in shape)
    y, x = np.mgrid[0 : height : spacing * 0.866, 0:width:spacing]
    x[1::2] += spacing / 2
    points = np.stack([x.ravel(), y.ravel()], 1)
    return points + rng.uniform(-jitter, jitter, points.shape) * spacing


def _cells(rng, points, size, angle, dark, rim=0.1, bend=0.0, vary=0.12):
    """Make nuclei of half axes `size`, each with its own size, tone and focus."""
    n = len(points)
    # Bounded, so that no nucleus of any seed is longer than the canvas's margin.
    spread = np.exp(vary * np.clip(rng.standard_normal((3, n)), -2.2, 2.2))
    return np.column_stack(
        [
            points,
            size[0] * spread[0],
            size[1] * spread[1],
            np.broadcast_to(angle, n) + rng.normal(0, 0.2, n),
            rng.normal(0, bend, n) if bend else np.zeros(n),
            dark * spread[2],
            np.full(n, rim),
            rng.uniform(0.5, 1.3, n),
        ]
    )


def _fibres(rng, x, y, wave=35.0):
    """Draw wavy strands: their tone (unit deviation) and direction in radians."""
    turn = rng.uniform(0, np.pi)
    bent = wave * _noise(rng, x.shape, 55) + wave / 9 * _noise(rng, x.shape, 12)
    across = -x * np.sin(turn) + y * np.cos(turn) + bent
    along = x * np.cos(turn) + y * np.sin(turn)
    sheet = ndimage.gaussian_filter(rng.standard_normal((512, 64)), (1.0, 1.2))
    tone = 0
    for thick, long, weight in ((2.2, 38, 1.0), (9, 90, 1.2)):  # fibrils, bundles
        place = [across / thick, along / long]
        tone += weight * ndimage.map_coordinates(
            sheet, place, order=1, mode="grid-wrap"
        )
    down, right = np.gradient(across)
    return (tone / tone.std()).astype(np.float32), np.arctan2(-right, down)


def _spindles(rng, shape, spacing, share, angle, size=1.0):
    """Scatter fibroblasts along `angle`, kept with probability `share` (a field)."""
    points = _scatter(rng, shape, spacing, 0.5)
    points = points[rng.random(len(points)) < _at(share, points)]
    half = (6.5 * size, 1.5 * size)
    return _cells(rng, points, half, _at(angle, points), 0.95, bend=0.011, vary=0.22)


def _glandular(rng, own, x, y, rich):
    """Draw rings of basal nuclei around open lumina, in stroma."""
    step, size = own.uniform(100, 130), own.uniform(0.9, 1.15)
    opening = own.uniform(0.35, 0.55)
    centres = _scatter(rng, x.shape, step, 0.28)
    centres = centres[rng.random(len(centres)) < 0.15 + 1.1 * _at(rich, centres)]
    n = len(centres)
    seed = np.full(x.shape, -1)
    ij = np.rint(centres[:, ::-1] / PITCH).astype(int)
    inside = ((ij >= 0) & (ij < x.shape)).all(1)
    seed[tuple(ij[inside].T)] = np.flatnonzero(inside)
    nearest = ndimage.distance_transform_edt(seed < 0, None, False, True)
    which = seed[tuple(nearest)]
    radius = rng.uniform(0.36, 0.52, n) * step
    lumen = np.clip(rng.normal(opening, 0.1, n), 0.15, 0.68)
    waves = [(k, rng.normal(0, 0.07, n), rng.uniform(0, 6.3, n)) for k in (2, 3, 4)]

    def outline(theta, gland):
        bumps = (a[gland] * np.cos(k * theta + b[gland]) for k, a, b in waves)
        return radius[gland] * (1 + sum(bumps))

    dx, dy = x - centres[which, 0], y - centres[which, 1]
    far, edge = np.hypot(dx, dy), outline(np.arctan2(dy, dx), which)
    share = far / edge
    ragged = lumen[which] + 0.035 * _noise(rng, x.shape, 4)
    tone, angle = _fibres(rng, x, y)
    gland = np.clip((edge - far) / 3 + 0.5, 0, 1)
    rim = np.exp(-(((far - edge - 2.5) / 2.2) ** 2))  # pale cleft around each gland
    eosin = (1 - gland) * (0.62 + 0.16 * tone) * (1 - 0.45 * rim)
    eosin += gland * (0.36 + 0.16 * (1 - share))
    each = np.rint(2 * np.pi * radius * 0.84 / (6.4 * size)).astype(int)
    owner = np.repeat(np.arange(n), each)
    turn = (np.arange(len(owner)) - (np.cumsum(each) - each)[owner]) / each[owner]
    theta = 2 * np.pi * (turn + rng.uniform(0, 1, n)[owner])
    theta += rng.normal(0, 0.03, len(owner))
    place = outline(theta, owner) - rng.normal(7.5, 1.6, len(owner)) * size
    points = centres[owner] + (place * [np.cos(theta), np.sin(theta)]).T
    mine = _at(which, points) == owner
    half = (5.2 * size, 3.0 * size)
    epithelium = _cells(rng, points[mine], half, theta[mine], 1.0, 0.25)
    stroma = (1 - gland) * np.clip(0.25 + 0.5 * rich, 0, 1)
    nuclei = np.concatenate([epithelium, _spindles(rng, x.shape, 17, stroma, angle)])
    basophil = 0.05 + gland * 0.13
    return Texture((share - ragged) * edge, eosin, basophil, nuclei)


def _fibrous(rng, own, x, y, rich):
    """Draw collagen in waves, with long thin nuclei that follow it."""
    size = own.uniform(0.9, 1.25)
    tone, angle = _fibres(rng, x, y, own.uniform(30, 55))
    gap = _noise(rng, x.shape, 30) * 0.5 + tone
    spindles = _spindles(
        rng, x.shape, own.uniform(12, 15), 0.12 + 0.8 * rich, angle, size * 1.25
    )
    eosin = 0.72 + 0.2 * tone - 0.12 * rich
    cracks = (gap + own.uniform(2.0, 2.4)) * 5
    return Texture(cracks, eosin, 0.04 + 0.06 * rich, spindles)


def _lymphoid(rng, own, x, y, rich):
    """Draw packed small round nuclei, pale follicle centres and thin septa."""
    size = own.uniform(0.92, 1.12)
    tone, angle = _fibres(rng, x, y)
    septum = np.abs(_noise(rng, x.shape, 38)) - 0.05 - 0.9 * np.clip(0.38 - rich, 0, 1)
    septum = np.clip(0.5 - septum * 9, 0, 1)
    follicle = np.zeros(x.shape, np.float32)
    for _ in range(own.integers(2, 6)):
        cx, cy = rng.uniform(0.15, 0.85, 2) * (x.max(), y.max())
        far = np.hypot(x - cx, (y - cy) * rng.uniform(0.8, 1.25))
        reach = rng.uniform(60, 110) + 6 * _noise(rng, x.shape, 12)
        follicle = np.maximum(follicle, np.clip((reach - far) / 12 + 0.5, 0, 1))
    follicle *= 1 - septum
    points = _scatter(rng, x.shape, own.uniform(7.6, 8.6) * size, 0.36)
    keep = (0.4 + 0.55 * rich) * (1 - 0.93 * septum) * (1 - 0.25 * follicle)
    points = points[rng.random(len(points)) < _at(keep, points)]
    turn = rng.uniform(0, np.pi, len(points))
    cells = _cells(rng, points, (3.3 * size, 2.95 * size), turn, 1.2, 0.05)
    pale = _at(follicle, points) > 0.5
    cells[pale] *= (1, 1, 1.35, 1.35, 1, 1, 0.62, 4, 1)
    cells = np.concatenate([cells, _spindles(rng, x.shape, 15, septum * 0.5, angle)])
    eosin = 0.2 + 0.06 * follicle + septum * (0.42 + 0.14 * tone)
    return Texture(np.full_like(tone, 50), eosin, 0.16 * (1 - septum) + 0.03, cells)


def _papillary(rng, own, x, y, rich):
    """Draw fronds with a fibrous core, lined by large pale nuclei, in open space."""
    size = own.uniform(0.9, 1.15)
    wide = own.uniform(9.5, 12)
    crest = _noise(rng, x.shape, wide) - _noise(rng, x.shape, wide * 2.2)
    far = ndimage.distance_transform_edt(crest > 0)
    far += ndimage.distance_transform_edt(crest <= 0)
    far = ndimage.gaussian_filter(far.astype(np.float32) * PITCH, 1.2)
    tone, angle = _fibres(rng, x, y, 15)
    # Clefts between fronds close towards the poor side, which is left to stroma.
    cleft = own.uniform(8, 12) + 5 * _noise(rng, x.shape, 12) - 32 * (1 - rich) ** 2
    depth = far - cleft + 1.2 * _noise(rng, x.shape, 3)
    points = _scatter(rng, x.shape, own.uniform(9.2, 10.6) * size, 0.3)
    lined = (_at(depth, points) > 5) & (_at(depth, points) < 22 * size)
    lined &= rng.random(len(points)) < 0.92
    down, right = np.gradient(far)
    outward = _at(np.arctan2(down, right), points[lined])
    cells = _cells(rng, points[lined], (5.6 * size, 4.5 * size), outward, 0.5, 0.75)
    stroma = np.clip((depth - 24 * size) / 4, 0, 1)
    spindles = _spindles(rng, x.shape, 16, stroma * (0.2 + 0.5 * rich), angle)
    eosin = 0.44 + stroma * (0.1 + 0.13 * tone)
    nuclei = np.concatenate([cells, spindles])
    return Texture(depth, eosin, 0.1 * (1 - stroma) + 0.03, nuclei)


DRAW = dict(zip(CLASSES, (_glandular, _fibrous, _lymphoid, _papillary), strict=True))


def _band(x, y, centre, turn, half, reach, curve=0.0, blur=2.0):
    """Draw a curved stroke of half width `half` and half length `reach`; 0-1."""
    along = (x - centre[0]) * np.cos(turn) + (y - centre[1]) * np.sin(turn)
    across = -(x - centre[0]) * np.sin(turn) + (y - centre[1]) * np.cos(turn)
    inside = np.minimum(half - np.abs(across + curve * along**2), reach - np.abs(along))
    return np.clip(inside / blur + 0.5, 0, 1), along, across


def _draw(scan, index, seed):
    """Draw a whole scan on the coarse grid, in the order tissue, stain, fold, pen."""
    rng = np.random.default_rng([seed, 0, index])
    # Scans of one patient share nuclear size, spacing and staining habit.
    own = np.random.default_rng([seed, 1, int(scan.patient[1:])])
    less = 0.78 if scan.mpp < 0.5 else 1.0  # 40x scans have four times the pixels
    unit = 8  # nodes, 16 µm: level-0 sizes divide by 16, tissue masks are whole
    shape = [
        round(size * less * rng.uniform(0.92, 1.08) / PITCH / unit) * unit + 1
        for size in (1000, 1300)
    ]
    y, x = (np.mgrid[0 : shape[0], 0 : shape[1]] * PITCH).astype(np.float32)
    mx, my = x.max() / 2, y.max() / 2
    # One side is rich in nuclei and the other poor, with a wandering border.
    turn = rng.uniform(0, 2 * np.pi)
    slope = (x - mx) / mx * np.cos(turn) + (y - my) / my * np.sin(turn)
    rich = np.clip(0.55 + 0.75 * slope + 0.16 * _noise(rng, shape, 45), 0, 1)
    texture = DRAW[scan.label](rng, own, x, y, rich)
    tilt = rng.uniform(-0.2, 0.2)
    u, v = (x - mx) + tilt * (y - my), (y - my) - tilt * (x - mx)
    round_ = (np.abs(u / mx) ** 3 + np.abs(v / my) ** 3) ** (1 / 3)
    ragged = 30 * _noise(rng, shape, 40) + 7 * _noise(rng, shape, 9)
    outline = (0.86 - round_) * min(mx, my) + ragged
    solid = np.minimum(texture.solid, outline)
    # Dyes vary over the slide and from field to field, and each on its own.
    weak = 0.42 if scan.pale else 1.0
    habit = np.exp(own.normal(0, 0.05, 2) + rng.normal(0, 0.04, 2)) * weak
    dyes = [
        habit[k] * (1 + 0.06 * _noise(rng, shape, 60) + 0.04 * _noise(rng, shape, 8))
        for k in range(2)
    ]
    fold = pen = None
    if scan.folded:
        spot = np.array([mx, my]) * rng.uniform(0.8, 1.2, 2)
        bend = rng.uniform(-4e-4, 4e-4)
        turn = rng.uniform(0, np.pi)
        fold, _, across = _band(x, y, spot, turn, rng.uniform(16, 26), 380, bend, 5)
        fold *= 1 + 0.2 * _noise(rng, shape, 6) + 0.1 * np.sin(across / 4)
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
        pen = np.clip(pen * (1 + 0.1 * _noise(rng, shape, 10)), 0, 1.4)
    return rng, texture, solid.astype(np.float32), dyes, fold, pen


def _stamp(nuclei, shape, mpp):
    """Put nuclei (µm) on a pixel canvas: chromatin density and the true mask.

    Both come with a border of ``MARGIN`` px; `shape` is that of the slide.
    """
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
    return canvas, mask


def _render(scan, index, seed):
    """Render a scan to (H, W, 3) uint8, its nuclei and its tissue mask (bool)."""
    rng, texture, solid, dyes, fold, pen = _draw(scan, index, seed)
    factor = round(PITCH / scan.mpp)
    height, width = ((n - 1) * factor for n in solid.shape)
    nuclei = texture.nuclei
    kept = _at(solid, nuclei[:, :2]) > 0.8 * nuclei[:, 3]
    far = nuclei[:, :2] / scan.mpp
    kept &= ((far >= 0) & (far < (width, height))).all(1)
    chromatin, truth = _stamp(nuclei[kept], (height, width), scan.mpp)
    chromatin = chromatin[MARGIN:-MARGIN, MARGIN:-MARGIN]
    truth = truth[MARGIN:-MARGIN, MARGIN:-MARGIN]
    gains = [dye * (1 if fold is None else 1 + 0.85 * fold) for dye in dyes]
    coarse = [solid, texture.hematoxylin * gains[0], texture.eosin * gains[1], gains[0]]
    light = 1 + 0.012 * _noise(rng, solid.shape, 120)
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
        speck = [np.tile(g[here.start % 512 :][: n * factor], tiles) for g in grain]
        speck = [g[:, :width] for g in speck]
        depth, blue, pink, gain = (_enlarge(f, factor, top, n) for f in coarse)
        cover = np.clip(depth / 1.2 + 0.5, 0, 1)
        truth[here] &= cover > 0.5
        body = chromatin[here] * cover
        h = blue * cover * (1 + 0.3 * speck[1])
        h += body * gain * (1 + 0.22 * speck[0])
        e = pink * cover * (1 + 0.1 * speck[1]) * (1 - 0.55 * np.minimum(body, 1))
        ink = 0 if pen is None else _enlarge(pen, factor, top, n)
        if pen is not None:
            truth[here] &= ink < 0.5
        lamp = _enlarge(light, factor, top, n)
        for c in range(3):
            density = h * stain.hematoxylin[c] + e * stain.eosin[c]
            if pen is not None:
                density += ink * PENS[scan.pen][c]
            value = lamp * stain.white[c] * np.exp(-density) + 1.6 * speck[2 + c]
            image[here, :, c] = np.clip(value + 0.5, 0, 255)
    # Tissue: stained ground without opaque pen; lumina below 5000 µm² are filled.
    block = round(MASK_MPP / PITCH)
    stained = _blocks((solid > 0) * 1.0, block) >= 0.5
    stained = ndimage.binary_closing(np.pad(stained, 2), iterations=2)[2:-2, 2:-2]
    holes, _ = ndimage.label(~stained)
    small = np.bincount(holes.ravel()) < 5000 / MASK_MPP**2
    small[0] = False
    tissue = stained | small[holes]
    if pen is not None:
        tissue &= _blocks((pen < 0.5) * 1.0, block) >= 0.5
    return image, truth, tissue


def _blocks(field, size):
    """Average `size` x `size` blocks of nodes; the closing row and column are cut."""
    height, width = ((n - 1) // size for n in field.shape)
    field = field[: height * size, : width * size]
    return field.reshape(height, size, width, size).mean((1, 3))


def _shrink(image):
    """Reduce an image four times by averaging; cut to whole blocks."""
    height, width = (n // 4 * 4 for n in image.shape[:2])
    image = image[:height, :width]
    tall = sum(image[k::4].astype(np.uint16) for k in range(4))
    return ((sum(tall[:, k::4] for k in range(4)) + 8) // 16).astype(np.uint8)


def _publish(path, write):
    """Call `write` on a temporary name, then rename, so that `path` is never partial.

    The name carries machine and process: two runs may fill one folder at once.
    """
    part = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_tiff(image, mpp, path):
    """Write a tiled JPEG pyramid, reduced 4 and 16 times, that OpenSlide opens."""
    options = {
        "tile": (TILE, TILE),
        "photometric": "rgb",
        "subsampling": (2, 2),
        "compression": "jpeg",
        "compressionargs": {"level": 85},
        "resolutionunit": "CENTIMETER",
        "metadata": None,
        "software": GENERATOR,
        "maxworkers": 1,
    }
    with tifffile.TiffWriter(path) as tiff:
        for level in range(3):
            image = _shrink(image) if level else image
            per_cm = 1e4 / (mpp * 4**level)
            note = "Synthetic phantom: not tissue" if level == 0 else None
            tiff.write(
                image,
                subfiletype=int(level > 0),
                resolution=(per_cm, per_cm),
                description=note,
                **options,
            )


def _files(slide):
    """Name the files of one scan; the image comes last and marks the scan as done."""
    return {
        "nuclei_mask": f"nuclei_masks/{slide}.png",
        "tissue_mask": f"tissue_masks/{slide}.png",
        "file": f"images/{slide}.tif",
    }


def _write_scan(folder, index, seed):
    """Write scan `index` unless it is there."""
    scan = plan_scan(index)
    paths = {key: Path(folder, name) for key, name in _files(scan.slide).items()}
    if all(path.exists() for path in paths.values()):
        return
    image, nuclei, tissue = _render(scan, index, seed)
    for key, mask in (("nuclei_mask", nuclei), ("tissue_mask", tissue)):
        picture = Image.fromarray(mask)
        _publish(paths[key], lambda part, p=picture: p.save(part, format="PNG"))
    _publish(paths["file"], lambda part: _write_tiff(image, scan.mpp, part))


def _claim(folder, n_scans, seed):
    """Note in ``phantom.json`` what the folder will hold, or check what it holds."""
    asked = {"generator": GENERATOR, "n_scans": n_scans, "seed": seed}
    note = folder / "phantom.json"
    if note.exists():
        try:
            found = json.loads(note.read_text())
        except ValueError:
            found = "an unreadable phantom.json"
    elif (folder / "slides.csv").exists():
        found = "a slides.csv without phantom.json, so another archive"
    else:
        text = json.dumps(asked, indent=1) + "\n"
        return _publish(note, lambda part: part.write_text(text))
    if found != asked:
        raise ValueError(
            f"{folder} holds {found}, but {asked} was asked for; "
            "pass another folder, or delete this one to generate it anew"
        )


def write_phantom_archive(folder, n_scans=24, seed=0, executor=None) -> pd.DataFrame:
    """Write synthetic H&E-like slides with known nuclei and tissue.

    Four textures (`label`) x two sites with their own stains x patients. Half of the
    patients have two scans. Scan i depends on (`seed`, i) only. A run that was
    stopped goes on where it was: scans that are there are kept.

    Parameters
    ----------
    folder : path-like
        Where to write; made if missing.
    n_scans : int
        Number of scans; the design is balanced at 24 and repeats with new patients.
    seed : int
        Seed of everything, at least 0.
    executor : concurrent.futures.Executor, optional
        Runs one task a scan; without it scans are written one after the other.

    Returns
    -------
    pandas.DataFrame
        The slide table, also ``slides.csv``, which is written last: `file`, `slide`,
        `patient`, `label`, `site`, `preparation`, `mpp` (µm/px at level 0),
        `objective`, `pen` (a colour or ``"none"``), `folded`, `pale`, `nuclei_mask`
        (1-bit PNG of level-0 size) and `tissue_mask` (1-bit PNG, 4 µm/px). Files are
        relative to `folder`.

    Raises
    ------
    ValueError
        If the folder holds another archive, or `n_scans` or `seed` is out of range.

    Notes
    -----
    Tissue is stained ground at 4 µm/px: folds are tissue; white ground, open clefts and
    lumina of 5000 µm² or more are not; opaque pen (0.5 or more of full ink) is neither
    tissue nor nuclei, whatever lies under it.

    Examples
    --------
    >>> plan_scan(5)[:4]
    ('phantom_005', 'P010', 'fibrous', 'B')
    """
    for name, value, least in (("n_scans", n_scans, 1), ("seed", seed, 0)):
        if value != int(value) or value < least:
            raise ValueError(f"{name}={value}: pass a whole number of {least} or more")
    folder, n_scans, seed = Path(folder), int(n_scans), int(seed)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, n_scans, seed)
    for name in _files(""):
        (folder / _files("")[name]).parent.mkdir(exist_ok=True)
    run = map if executor is None else executor.map
    list(run(_write_scan, [str(folder)] * n_scans, range(n_scans), [seed] * n_scans))
    for part in folder.rglob(f".*.{platform.node()}.*.part"):
        if not psutil.pid_exists(int(part.suffixes[-2][1:])):  # left by a killed run
            part.unlink(missing_ok=True)
    scans = [plan_scan(index) for index in range(n_scans)]
    table = pd.DataFrame(scans)
    files = pd.DataFrame([_files(scan.slide) for scan in scans])
    table = table.join(files)
    table = table[["file", *Scan._fields, "nuclei_mask", "tissue_mask"]]
    _publish(folder / "slides.csv", lambda part: table.to_csv(part, index=False))
    return table
