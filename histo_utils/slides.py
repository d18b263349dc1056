"""Open a slide, know its µm per pixel, find the tissue, lay a grid over it.

Coordinates ``x`` and ``y`` are always level-0 pixels of the slide (the finest level),
counted from its top left corner; ``mpp`` is always µm per pixel.
"""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import tifffile
from PIL import Image
from scipy import ndimage
from skimage import morphology

PLAUSIBLE_MPP = (0.1, 4.0)  # µm per pixel; outside it a tag is wrong (72 dpi is 353)
DISAGREEMENT = 0.05  # two sources of µm per pixel further apart than this: warn
MASK_MPP = 4.0  # µm per pixel of the tissue mask
MASK_LONG_SIDE = 4096  # px: bounds the mask's memory on large slides
# Optical density. Fixed, because Otsu's threshold drops a pale piece beside a dark one;
# anywhere from 0.012 to 0.03 the two real slides' tissue area changes by under 6 %.
TISSUE_EXCESS = 0.02
INK_DENSITY = 0.1  # optical density from which glass is not glass any more
INK_MARGIN = 2  # px at 4 µm: the blurred rim of a pen mark
BLOCK = 256  # px: a thumbnail is read in blocks, so a one-level slide fits in memory
MAX_ARRAY_PIXELS = 2**30  # untiled images are decoded whole; above 3 GB that is refused
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp"}
UNITS = {"centimeter": 1e4, "inch": 25_400.0}  # µm


class SlideError(Exception):
    """A slide that cannot be opened, read, or measured; the message says what to do."""


class MissingScaleError(SlideError):
    """A slide whose µm per pixel is neither given nor found."""


class Slide(AbstractContextManager):
    """One open slide; made by `open_slide`.

    ``dimensions`` are (width, height) in level-0 pixels, ``downsamples`` the factor of
    each stored level, ``mpp`` µm per level-0 pixel with its ``mpp_source``, and
    ``mpp_found`` every value by source, also those not used; ``objective`` may be None.
    """

    def __init__(self, path, mpp=None):
        self.path = Path(path)
        self._handle = self._owner = None
        handle = self._open()
        self.dimensions = tuple(handle.dimensions)
        self.downsamples = tuple(float(d) for d in handle.level_downsamples)
        found, self.objective = _read_tags(self.path, handle)
        self.mpp_found = found if mpp is None else {"given": float(mpp), **found}
        self.mpp, self.mpp_source = resolve_mpp(self.mpp_found, self.path.name)
        if self.objective and not 6 <= self.objective * self.mpp <= 16:
            warnings.warn(
                f"{self.path.name}: objective {self.objective:g}× and {self.mpp:.3g} "
                "µm/px do not fit together (20× is about 0.5, 40× about 0.25); "
                "check the slide, and pass mpp= if the file is wrong",
                stacklevel=3,
            )

    def __getstate__(self):
        return {**self.__dict__, "_handle": None, "_owner": None}

    def __exit__(self, *exc):
        self.close()

    def close(self):
        """Close the file; the next read opens it again."""
        if self._handle is not None:
            self._handle.close()
        self._handle = None

    def _open(self):
        # OpenSlide handles survive neither pickling nor a fork: one for each process.
        if self._handle is None or self._owner != os.getpid():
            self._handle, self._owner = _open_file(self.path), os.getpid()
        return self._handle

    def _level_region(self, level, x, y, width, height):
        """RGB pixels of a rectangle in pixels of ``level``; white beyond the edge."""
        corner = tuple(round(n * self.downsamples[level]) for n in (x, y))
        try:
            rgba = self._open().read_region(corner, level, (width, height))
        except openslide.OpenSlideError as error:
            # OpenSlide handles stay failed after the first error; a new one may read on
            self.close()
            raise SlideError(
                f"{self.path.name}: cannot read {width}×{height} px at level {level}, "
                f"x={corner[0]}, y={corner[1]}: {error}. The file is probably damaged; "
                "copy it again from its source and compare checksums"
            ) from error
        # OpenSlide returns transparency where nothing is.
        rgba = np.asarray(rgba)
        share = rgba[..., 3:].astype(np.float32) / 255
        if share.min() == 1:
            return np.ascontiguousarray(rgba[..., :3])
        return np.rint(rgba[..., :3] * share + 255 * (1 - share)).astype(np.uint8)

    def _resampled(self, x, y, width, height, mpp):
        """RGB (height, width, 3) at ``mpp`` with its top left corner at (x, y)."""
        scale = mpp / self.mpp  # level-0 pixels per output pixel
        level = max(
            (i for i, d in enumerate(self.downsamples) if d <= scale * 1.01),
            key=lambda i: self.downsamples[i],
            default=0,
        )
        factor, size = self.downsamples[level], np.array([width, height])
        begin = np.array([x, y]) / factor
        end = begin + size * scale / factor
        # Whole pixels are read, then cut at fractions of a pixel while resampling, so
        # that a patch covers exactly size × mpp µm whatever the levels are.
        first = np.floor(begin + 1e-6).astype(int)
        sides = np.ceil(end - 1e-6).astype(int) - first
        pixels = self._level_region(level, *first.tolist(), *sides.tolist())
        box = np.clip([begin - first, end - first], 0, sides)
        if (sides == size).all() and np.allclose(box, [[0, 0], size], atol=0.01):
            return pixels
        box = tuple(box.ravel().tolist())
        image = Image.fromarray(pixels)
        return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box))

    def read(self, x, y, size, mpp):
        """Read a square patch.

        Parameters
        ----------
        x, y : float
            Top left corner in level-0 pixels; may lie outside (white there).
        size : int
            Side of the patch in pixels of the result.
        mpp : float
            µm per pixel of the result; not finer than the slide, or it warns.

        Returns
        -------
        numpy.ndarray
            uint8, (size, size, 3), RGB.

        Raises
        ------
        SlideError
            If the file is damaged there.
        """
        if size < 1:
            raise ValueError(f"size={size} is not a patch; give a side of 1 px or more")
        if mpp < self.mpp * (1 - DISAGREEMENT):
            warnings.warn(
                f"{self.path.name}: mpp={mpp:g} is finer than the scan's "
                f"{self.mpp:.3g}; pixels are interpolated, no detail is gained",
                stacklevel=2,
            )
        return self._resampled(x, y, size, size, mpp)

    def thumbnail(self, mpp):
        """Read the whole slide at ``mpp``, block by block; uint8 (height, width, 3)."""
        width, height = (max(1, round(n * self.mpp / mpp)) for n in self.dimensions)
        out = np.empty((height, width, 3), np.uint8)
        step = mpp / self.mpp
        for top, left in product(range(0, height, BLOCK), range(0, width, BLOCK)):
            w, h = min(BLOCK, width - left), min(BLOCK, height - top)
            block = self._resampled(left * step, top * step, w, h, mpp)
            out[top : top + h, left : left + w] = block
        return out


def open_slide(path, mpp=None):
    """Open a slide with OpenSlide, or a plain image that OpenSlide does not open.

    Parameters
    ----------
    path : str or pathlib.Path
        A whole-slide image, a TIFF of any kind, a PNG or a JPEG.
    mpp : float, optional
        µm per level-0 pixel; wins over what the file says. Two sources more than 5 %
        apart raise a UserWarning.

    Returns
    -------
    Slide

    Raises
    ------
    SlideError
        If nothing can open it, or if its µm per pixel is neither given nor found.
    """
    return Slide(path, mpp)


def resolve_mpp(found, name="slide"):
    """Choose from values by source (given, vendor, resolution tag); value, source."""
    low, high = PLAUSIBLE_MPP
    order = ("given", "vendor", "resolution tag")
    usable = [(found[s], s) for s in order if low <= found.get(s, 0) <= high]
    if "given" in found and (not usable or usable[0][1] != "given"):
        raise SlideError(
            f"{name}: mpp={found['given']:g} was given; expected µm per pixel between "
            f"{low} and {high} (20× is about 0.5, 40× about 0.25)"
        )
    if not usable:
        seen = ", ".join(f"{s} {v:g}" for s, v in found.items()) or "nothing"
        raise MissingScaleError(
            f"{name}: no µm per pixel between {low} and {high} in the file (found: "
            f"{seen}); pass mpp=, or give it in the mpp column of the slide table "
            "(20× is about 0.5, 40× about 0.25)"
        )
    if max(usable)[0] > min(usable)[0] * (1 + DISAGREEMENT):
        listed = ", ".join(f"{s} {v:.4g}" for v, s in usable)
        warnings.warn(
            f"{name}: sources of µm per pixel disagree; using the first of {listed}",
            stacklevel=2,
        )
    return usable[0]


def tissue_mask(slide):
    """Find the tissue of an H&E slide, pale tissue too, without pen marks.

    Both stains absorb green most, glass absorbs nothing, and pens absorb red most
    (blue, green) or all colours alike (black). So tissue is where the optical density
    in green exceeds the mean of the other two by more than the ground's own noise.

    Parameters
    ----------
    slide : Slide

    Returns
    -------
    numpy.ndarray
        bool (rows, columns) over the whole slide, at 4 µm per pixel, or coarser where
        the longer side would exceed 4096 px. Red pen and blood count as tissue.
    """
    width, height = slide.dimensions
    mpp = max(MASK_MPP, max(width, height) * slide.mpp / MASK_LONG_SIDE)
    return tissue_of_image(slide.thumbnail(mpp), mpp)


def tissue_of_image(image, mpp):
    """Mask of an image (h, w, 3); holes < 0.01 mm² filled, specks < 0.005 dropped."""
    pixel = mpp**2 * 1e-6  # mm²
    mask = _stained(_smooth_density(image))
    mask = morphology.remove_small_holes(mask, max_size=int(0.01 / pixel))
    return morphology.remove_small_objects(mask, max_size=int(0.005 / pixel))


def without_ink(image, mpp):
    """Paint white what is dark without H&E's colours; uint8 (h, w, 3)."""
    # At 4 µm nuclei and their surroundings mix: a dark nucleus does not pass for ink.
    height, width = image.shape[:2]
    small = [max(1, round(side * mpp / MASK_MPP)) for side in (width, height)]
    coarse = np.asarray(Image.fromarray(image).resize(small, Image.Resampling.BOX))
    density = _smooth_density(coarse)
    ink = (density.mean(-1) > INK_DENSITY) & ~_stained(density)
    if not ink.any():
        return image
    ink = ndimage.binary_dilation(ink, iterations=INK_MARGIN)
    ink = np.asarray(Image.fromarray(ink).resize((width, height)))
    return np.where(ink[..., None], np.uint8(255), image)


def _smooth_density(image):
    """Optical density (base 10) of an image, smoothed over a pixel."""
    density = -np.log10((image.astype(np.float32) + 1) / 256)
    return ndimage.gaussian_filter(density, (1, 1, 0))


def _stained(density):
    """Where smoothed densities have the colours of H&E."""
    red, green, blue = np.moveaxis(density, -1, 0)
    excess = green - (red + blue) / 2
    coloured = excess > 0.08 * (red + green + blue) / 3  # not black or grey
    pink_to_purple = green > 0.8 * red  # not blue or green
    return (excess > TISSUE_EXCESS) & coloured & pink_to_purple


def patch_grid(
    slide, size=1000, mpp=0.5, overlap=0.0, mask=None, min_tissue=0.7, whole=True
):
    """Lay a grid of square patches over a slide and keep those on tissue.

    Parameters
    ----------
    slide : Slide
    size : int
        Side of a patch in pixels at ``mpp`` (1000 px at 0.5 µm: 500 µm, as KimiaNet).
    mpp : float
        µm per pixel at which the patches will be read.
    overlap : float
        Share of a side that neighbours share, 0 ≤ overlap < 1 (KimiaNet's published
        coordinates: 0.25).
    mask : numpy.ndarray, optional
        bool (rows, columns) over the whole slide; `tissue_mask` if not given.
    min_tissue : float
        Least share of tissue in a patch (Yottixel: 0.7); 0 keeps every patch.
    whole : bool
        Leave out patches that reach beyond the edge (False keeps them, as Yottixel).

    Returns
    -------
    pandas.DataFrame
        One row per patch, row by row: ``x``, ``y`` (level-0 pixels), ``size``, ``mpp``,
        ``tissue`` (share 0–1).
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap} was given; expected 0 ≤ overlap < 1")
    side = max(1, round(size * mpp / slide.mpp))  # level-0 pixels
    step = max(1, round(side * (1 - overlap)))
    mask = tissue_mask(slide) if mask is None else np.asarray(mask, bool)
    starts, ends = [], []
    for length, n in zip(slide.dimensions[::-1], mask.shape, strict=True):
        starts.append(np.arange(0, length - side + 1 if whole else length, step))
        # Corners and the window's own size are cut to whole mask pixels, as Yottixel's
        # released code does; at least one pixel, and never beyond the mask.
        first = np.minimum((starts[-1] * (n / length)).astype(int), n - 1)
        ends.append((first, np.minimum(first + max(1, int(side * (n / length))), n)))
    (top, bottom), (left, right) = ends
    total = np.pad(mask, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    inside = total[np.ix_(bottom, right)] - total[np.ix_(top, right)]
    inside += total[np.ix_(top, left)] - total[np.ix_(bottom, left)]
    y, x = (axis.ravel() for axis in np.meshgrid(*starts, indexing="ij"))
    table = pd.DataFrame({"x": x, "y": y, "size": size, "mpp": float(mpp)})
    table["tissue"] = (inside / np.outer(bottom - top, right - left)).ravel()
    return table[table["tissue"] >= min_tissue].reset_index(drop=True)


def _open_file(path):
    """Open with OpenSlide, or decode a plain image into an `openslide.ImageSlide`."""
    if not path.exists():
        raise SlideError(f"{path}: no such file")
    try:
        if openslide.OpenSlide.detect_format(path):
            return openslide.OpenSlide(path)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return openslide.ImageSlide(Image.open(path).convert("RGB"))
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            small = page.imagewidth * page.imagelength <= MAX_ARRAY_PIXELS
            pixels = page.asarray() if small else None
    except Exception as error:  # each library has its own errors for a bad file
        raise SlideError(
            f"{path.name}: neither OpenSlide nor tifffile can open it "
            f"({type(error).__name__}: {error}). Expected a whole-slide image or a "
            "TIFF; if it should be one, copy it again and compare checksums"
        ) from error
    if not small:
        raise SlideError(
            f"{path.name}: {page.imagewidth}×{page.imagelength} px without tiles is "
            "too large to decode whole; convert it to a tiled pyramid "
            "(vips tiffsave IN OUT --tile --pyramid --compression jpeg)"
        )
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, -1)
    if pixels.ndim != 3 or pixels.shape[2] < 3 or pixels.dtype != np.uint8:
        raise SlideError(
            f"{path.name}: {pixels.dtype} {pixels.shape}; expected 8-bit grey or RGB"
        )
    return openslide.ImageSlide(Image.fromarray(np.ascontiguousarray(pixels[..., :3])))


def _read_tags(path, handle):
    """µm per pixel by source, and the objective power, where the file says them."""
    if isinstance(handle, openslide.ImageSlide):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return {}, None  # the resolution of a JPEG is that of a printer
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            tagged = "XResolution" in page.tags
            per_micrometre = page.get_resolution("MICROMETER")[0] if tagged else 0
        return {"resolution tag": 1 / per_micrometre} if per_micrometre else {}, None

    def number(key):
        try:
            value = float(handle.properties.get(key))
        except (TypeError, ValueError):
            return None
        return value if value > 0 else None

    found = {}
    # For generic TIFFs OpenSlide's own key is only the resolution tag over again.
    if handle.properties.get("openslide.vendor") != "generic-tiff":
        found["vendor"] = number("openslide.mpp-x")
    unit = UNITS.get(handle.properties.get("tiff.ResolutionUnit", "").lower())
    per_unit = number("tiff.XResolution")
    found["resolution tag"] = unit / per_unit if unit and per_unit else None
    objective = number("openslide.objective-power")
    return {source: value for source, value in found.items() if value}, objective
