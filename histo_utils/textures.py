"""The four textures of the phantoms on a coarse grid.

A texture is where the tissue is solid, how much of either dye lies outside nuclei, and
where the nuclei are. Lengths are in µm; fields have one node every ``PITCH`` µm.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

PITCH = 2.0  # µm between nodes of the coarse grid


class Texture(NamedTuple):
    """One class on the coarse grid, and its nuclei."""

    solid: np.ndarray  # (h, w) µm to the nearest lumen or cleft, negative inside it
    eosin: np.ndarray  # (h, w) dye outside nuclei
    haematoxylin: np.ndarray  # (h, w) dye outside nuclei
    nuclei: np.ndarray  # (n, 9): x y long short angle bend dark rim softness


def enlarge(grid, factor, top=0, rows=None):
    """Interpolate linearly between nodes: `rows` intervals from row `top` on."""
    rows = len(grid) - 1 - top if rows is None else rows
    share = ((np.arange(factor, dtype=np.float32) + 0.5) / factor)[:, None]
    grid = grid[top : top + rows + 1].astype(np.float32)
    tall = grid[:-1, None] + (grid[1:] - grid[:-1])[:, None] * share
    tall = tall.reshape(rows * factor, -1, 1)
    wide = tall[:, :-1] + (tall[:, 1:] - tall[:, :-1]) * share[:, 0]
    return wide.reshape(rows * factor, -1)


def noise(rng, shape, scale):
    """Smooth noise of unit deviation, `scale` in nodes."""
    step = max(1, int(scale / 2.5))
    small = rng.standard_normal([n // step + 2 for n in shape], dtype=np.float32)
    small = ndimage.gaussian_filter(small, scale / step, mode="wrap")
    small /= small.std()
    return (enlarge(small, step) if step > 1 else small)[: shape[0], : shape[1]]


def look_up(field, points):
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
    turn = np.broadcast_to(angle, n) + rng.normal(0, 0.2, n)
    bent = rng.normal(0, bend, n) if bend else np.zeros(n)
    soft = rng.uniform(0.5, 1.3, n)
    return np.column_stack(
        [points, size[0] * spread[0], size[1] * spread[1], turn, bent, dark * spread[2],
         np.full(n, rim), soft]
    )  # fmt: skip


def _fibres(rng, x, y, wave=35.0):
    """Wavy strands: their tone (unit deviation) and direction in radians."""
    turn = rng.uniform(0, np.pi)
    bent = wave * noise(rng, x.shape, 55) + wave / 9 * noise(rng, x.shape, 12)
    across = -x * np.sin(turn) + y * np.cos(turn) + bent
    along = x * np.cos(turn) + y * np.sin(turn)
    sheet = ndimage.gaussian_filter(rng.standard_normal((512, 64)), (1.0, 1.2))
    tone = 0
    for thick, long, weight in ((2.2, 38, 1.0), (9, 90, 1.2)):  # fibrils, bundles
        place = [across / thick, along / long]
        tone += weight * ndimage.map_coordinates(sheet, place, None, 1, "grid-wrap")
    down, right = np.gradient(across)
    return (tone / tone.std()).astype(np.float32), np.arctan2(-right, down)


def _spindles(rng, shape, spacing, share, angle, size=1.0):
    """Scatter fibroblasts along `angle`, kept with probability `share` (a field)."""
    points = _scatter(rng, shape, spacing, 0.5)
    points = points[rng.random(len(points)) < look_up(share, points)]
    half, turn = (6.5 * size, 1.5 * size), look_up(angle, points)
    return _cells(rng, points, half, turn, 0.95, bend=0.011, vary=0.22)


def _glandular(rng, own, x, y, rich):
    """Rings of basal nuclei around open lumina, in stroma."""
    step, size = own.uniform(100, 130), own.uniform(0.9, 1.15)
    opening = own.uniform(0.35, 0.55)
    centres = _scatter(rng, x.shape, step, 0.28)
    centres = centres[rng.random(len(centres)) < 0.15 + 1.1 * look_up(rich, centres)]
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
    ragged = lumen[which] + 0.035 * noise(rng, x.shape, 4)
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
    mine = look_up(which, points) == owner
    half = (5.2 * size, 3.0 * size)
    epithelium = _cells(rng, points[mine], half, theta[mine], 1.0, 0.25)
    stroma = (1 - gland) * np.clip(0.25 + 0.5 * rich, 0, 1)
    nuclei = np.concatenate([epithelium, _spindles(rng, x.shape, 17, stroma, angle)])
    basophil = 0.05 + gland * 0.13
    return Texture((share - ragged) * edge, eosin, basophil, nuclei)


def _fibrous(rng, own, x, y, rich):
    """Collagen in waves, with long thin nuclei that follow it."""
    size = own.uniform(0.9, 1.25)
    tone, angle = _fibres(rng, x, y, own.uniform(30, 55))
    gap = noise(rng, x.shape, 30) * 0.5 + tone
    step, share = own.uniform(12, 15), 0.12 + 0.8 * rich
    spindles = _spindles(rng, x.shape, step, share, angle, size * 1.25)
    eosin = 0.72 + 0.2 * tone - 0.12 * rich
    cracks = (gap + own.uniform(2.0, 2.4)) * 5
    return Texture(cracks, eosin, 0.04 + 0.06 * rich, spindles)


def _lymphoid(rng, own, x, y, rich):
    """Packed small round nuclei, pale follicle centres and thin septa."""
    size = own.uniform(0.92, 1.12)
    tone, angle = _fibres(rng, x, y)
    septum = np.abs(noise(rng, x.shape, 38)) - 0.05 - 0.9 * np.clip(0.38 - rich, 0, 1)
    septum = np.clip(0.5 - septum * 9, 0, 1)
    follicle = np.zeros(x.shape, np.float32)
    for _ in range(own.integers(2, 6)):
        cx, cy = rng.uniform(0.15, 0.85, 2) * (x.max(), y.max())
        far = np.hypot(x - cx, (y - cy) * rng.uniform(0.8, 1.25))
        reach = rng.uniform(60, 110) + 6 * noise(rng, x.shape, 12)
        follicle = np.maximum(follicle, np.clip((reach - far) / 12 + 0.5, 0, 1))
    follicle *= 1 - septum
    points = _scatter(rng, x.shape, own.uniform(7.6, 8.6) * size, 0.36)
    keep = (0.4 + 0.55 * rich) * (1 - 0.93 * septum) * (1 - 0.25 * follicle)
    points = points[rng.random(len(points)) < look_up(keep, points)]
    turn = rng.uniform(0, np.pi, len(points))
    cells = _cells(rng, points, (3.3 * size, 2.95 * size), turn, 1.2, 0.05)
    pale = look_up(follicle, points) > 0.5
    cells[pale] *= (1, 1, 1.35, 1.35, 1, 1, 0.62, 4, 1)
    cells = np.concatenate([cells, _spindles(rng, x.shape, 15, septum * 0.5, angle)])
    eosin = 0.2 + 0.06 * follicle + septum * (0.42 + 0.14 * tone)
    return Texture(np.full_like(tone, 50), eosin, 0.16 * (1 - septum) + 0.03, cells)


def _papillary(rng, own, x, y, rich):
    """Fronds with a fibrous core, lined by large pale nuclei, in open space."""
    size = own.uniform(0.9, 1.15)
    wide = own.uniform(9.5, 12)
    crest = noise(rng, x.shape, wide) - noise(rng, x.shape, wide * 2.2)
    far = ndimage.distance_transform_edt(crest > 0)
    far += ndimage.distance_transform_edt(crest <= 0)
    far = ndimage.gaussian_filter(far.astype(np.float32) * PITCH, 1.2)
    tone, angle = _fibres(rng, x, y, 15)
    # Clefts between fronds close towards the poor side, which is left to stroma.
    cleft = own.uniform(8, 12) + 5 * noise(rng, x.shape, 12) - 32 * (1 - rich) ** 2
    depth = far - cleft + 1.2 * noise(rng, x.shape, 3)
    points = _scatter(rng, x.shape, own.uniform(9.2, 10.6) * size, 0.3)
    lined = (look_up(depth, points) > 5) & (look_up(depth, points) < 22 * size)
    lined &= rng.random(len(points)) < 0.92
    down, right = np.gradient(far)
    outward = look_up(np.arctan2(down, right), points[lined])
    cells = _cells(rng, points[lined], (5.6 * size, 4.5 * size), outward, 0.5, 0.75)
    stroma = np.clip((depth - 24 * size) / 4, 0, 1)
    spindles = _spindles(rng, x.shape, 16, stroma * (0.2 + 0.5 * rich), angle)
    eosin = 0.44 + stroma * (0.1 + 0.13 * tone)
    nuclei = np.concatenate([cells, spindles])
    return Texture(depth, eosin, 0.1 * (1 - stroma) + 0.03, nuclei)


DRAW = {
    "glandular": _glandular, "fibrous": _fibrous,
    "lymphoid": _lymphoid, "papillary": _papillary,
}  # fmt: skip
