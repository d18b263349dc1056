"""Open a slide, know its µm per pixel, find the tissue, lay a grid over it.

Coordinates ``x`` and ``y`` are always level-0 pixels of the slide (the finest level),
counted from its top left corner; ``mpp`` is always µm per pixel.
"""

from __future__ import annotations

import os
import warnings
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


class SlideError(Exception):
    """A slide that cannot be opened, read, or measured; the message says what to do."""


class MissingScaleError(SlideError):
    """A slide whose µm per pixel is neither given nor found."""


class Slide:
    """One open slide; made by `open_slide`.

    Attributes
    ----------
    path : pathlib.Path
    dimensions : tuple of int
        Width and height in level-0 pixels.
    downsamples : tuple of float
        Downsampling factor of each stored level, 1.0 first.
    mpp : float
        µm per level-0 pixel.
    mpp_source : str
        ``"given"``, ``"vendor"`` or ``"resolution tag"``.
    mpp_found : dict
        Every value found, by source, also those that were not used.
    objective : float or None
        Objective power, where the file says it.
    """

    def __init__(self, path, mpp=None):
        self.path = Path(path)
        self._handle, self._owner = None, None
        handle = self._open()
        if isinstance(handle, np.ndarray):
            self.dimensions = (handle.shape[1], handle.shape[0])
            self.downsamples = (1.0,)
            found, self.objective = _tags_of_image(self.path), None
        else:
            self.dimensions = tuple(handle.dimensions)
            self.downsamples = tuple(float(d) for d in handle.level_downsamples)
            found, self.objective = _tags_of_openslide(handle.properties)
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

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    def __repr__(self):
        w, h = self.dimensions
        return f"Slide({self.path.name!r}, {w}×{h} px, {self.mpp:.4g} µm/px)"

    def close(self):
        """Close the file; the next read opens it again."""
        if self._handle is not None and not isinstance(self._handle, np.ndarray):
            self._handle.close()
        self._handle = None

    def _open(self):
        # OpenSlide handles survive neither pickling nor a fork: one for each process.
        if self._handle is None or self._owner != os.getpid():
            self._handle, self._owner = _open_file(self.path), os.getpid()
        return self._handle

    def _level_region(self, level, x, y, width, height):
        """RGB pixels of a rectangle in pixels of ``level``; white beyond the edge."""
        handle = self._open()
        if isinstance(handle, np.ndarray):
            return _crop_on_white(handle, x, y, width, height)
        factor = self.downsamples[level]
        corner = (round(x * factor), round(y * factor))
        try:
            rgba = np.asarray(handle.read_region(corner, level, (width, height)))
        except openslide.OpenSlideError as error:
            # OpenSlide handles stay failed after the first error; a new one may read on
            self.close()
            raise SlideError(
                f"{self.path.name}: cannot read {width}×{height} px at level {level}, "
                f"x={corner[0]}, y={corner[1]}: {error}. The file is probably damaged; "
                "copy it again from its source and compare checksums"
            ) from error
        return _on_white(rgba)

    def _resampled(self, x, y, width, height, mpp):
        """RGB (height, width, 3) at ``mpp`` with its top left corner at (x, y)."""
        scale = mpp / self.mpp  # level-0 pixels per output pixel
        level = max(
            (i for i, d in enumerate(self.downsamples) if d <= scale * 1.01),
            key=lambda i: self.downsamples[i],
            default=0,
        )
        factor = self.downsamples[level]
        left, top = x / factor, y / factor
        right, bottom = left + width * scale / factor, top + height * scale / factor
        # Whole pixels are read, then cut at fractions of a pixel while resampling, so
        # that a patch covers exactly size × mpp µm whatever the levels are.
        x0, y0 = int(np.floor(left + 1e-6)), int(np.floor(top + 1e-6))
        x1, y1 = int(np.ceil(right - 1e-6)), int(np.ceil(bottom - 1e-6))
        pixels = self._level_region(level, x0, y0, x1 - x0, y1 - y0)
        box = tuple(
            float(np.clip(value, 0, limit))
            for value, limit in (
                (left - x0, x1 - x0),
                (top - y0, y1 - y0),
                (right - x0, x1 - x0),
                (bottom - y0, y1 - y0),
            )
        )
        if (x1 - x0, y1 - y0) == (width, height) and np.allclose(
            box, (0, 0, width, height), atol=0.01
        ):
            return pixels
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
                f"{self.path.name}: {mpp:g} µm/px was asked of a slide scanned at "
                f"{self.mpp:.3g}; pixels are interpolated, no detail is gained",
                stacklevel=2,
            )
        return self._resampled(x, y, size, size, mpp)

    def thumbnail(self, mpp):
        """Read the whole slide at ``mpp``; uint8 (height, width, 3).

        Its memory is that of the result and one block, also where the slide has no
        coarse level.
        """
        width = max(1, round(self.dimensions[0] * self.mpp / mpp))
        height = max(1, round(self.dimensions[1] * self.mpp / mpp))
        out = np.empty((height, width, 3), np.uint8)
        step = mpp / self.mpp
        for top in range(0, height, BLOCK):
            for left in range(0, width, BLOCK):
                w, h = min(BLOCK, width - left), min(BLOCK, height - top)
                out[top : top + h, left : left + w] = self._resampled(
                    left * step, top * step, w, h, mpp
                )
        return out


def open_slide(path, mpp=None):
    """Open a slide with OpenSlide, or a plain image that OpenSlide does not open.

    Parameters
    ----------
    path : str or pathlib.Path
        A whole-slide image, a TIFF of any kind, a PNG or a JPEG.
    mpp : float, optional
        µm per level-0 pixel; wins over what the file says.

    Returns
    -------
    Slide

    Raises
    ------
    SlideError
        If nothing can open it, or if its µm per pixel is neither given nor found.

    Warns
    -----
    UserWarning
        If two sources of µm per pixel are more than 5 % apart.
    """
    return Slide(path, mpp)


def resolve_mpp(found, name="slide"):
    """Choose the µm per pixel among what was found: given, vendor, resolution tag.

    Parameters
    ----------
    found : dict
        Values in µm per pixel under the keys ``"given"``, ``"vendor"``,
        ``"resolution tag"``; any may be missing.
    name : str
        The slide's name, for the messages.

    Returns
    -------
    tuple
        The value and its source.

    Raises
    ------
    MissingScaleError
        If no value lies within 0.1–4 µm per pixel.
    SlideError
        If the value given does not.

    Examples
    --------
    >>> resolve_mpp({"vendor": 0.499, "resolution tag": 352.8})
    (0.499, 'vendor')
    """
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
    values = [v for v, _ in usable]
    if max(values) > min(values) * (1 + DISAGREEMENT):
        listed = ", ".join(f"{s} {v:.4g}" for v, s in usable)
        warnings.warn(
            f"{name}: sources of µm per pixel disagree ({listed}); "
            f"using {values[0]:.4g} ({usable[0][1]})",
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
        the longer side would exceed 4096 px. Red pen and blood are not told apart.
    """
    width, height = slide.dimensions
    mpp = max(MASK_MPP, max(width, height) * slide.mpp / MASK_LONG_SIDE)
    return tissue_of_image(slide.thumbnail(mpp), mpp)


def tissue_of_image(image, mpp):
    """Return the mask of `tissue_mask` for an image (h, w, 3) at ``mpp`` µm per pixel.

    Holes below 0.01 mm² are filled, specks below 0.005 mm² dropped.
    """
    mask = _stained(_smooth_density(image))
    pixel = mpp**2 * 1e-6  # mm²
    mask = morphology.remove_small_holes(mask, max_size=int(0.01 / pixel))
    return morphology.remove_small_objects(mask, max_size=int(0.005 / pixel))


def without_ink(image, mpp):
    """Paint ink white: what is dark but has not the colours of H&E.

    Parameters
    ----------
    image : numpy.ndarray
        uint8 (h, w, 3).
    mpp : float
        µm per pixel; colours are judged at 4 µm, where nuclei and their surroundings
        mix, so that a dark nucleus is not taken for ink.

    Returns
    -------
    numpy.ndarray
        uint8 (h, w, 3); the image itself where it holds no ink.
    """
    height, width = image.shape[:2]
    small = (
        max(1, round(width * mpp / MASK_MPP)),
        max(1, round(height * mpp / MASK_MPP)),
    )
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
        One row a patch, row by row: ``x``, ``y`` (level-0 pixels), ``size``, ``mpp``,
        ``tissue`` (share 0–1).
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap} was given; expected 0 ≤ overlap < 1")
    side = max(1, round(size * mpp / slide.mpp))  # level-0 pixels
    step = max(1, round(side * (1 - overlap)))
    mask = tissue_mask(slide) if mask is None else np.asarray(mask, bool)
    width, height = slide.dimensions
    columns = np.arange(0, width - side + 1 if whole else width, step)
    rows = np.arange(0, height - side + 1 if whole else height, step)
    tissue = _window_shares(mask, columns, rows, side, slide.dimensions)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    table = pd.DataFrame(
        {"x": x.ravel(), "y": y.ravel(), "size": size, "mpp": float(mpp)}
    )
    table["tissue"] = tissue.ravel()
    return table[table["tissue"] >= min_tissue].reset_index(drop=True)


def _window_shares(mask, columns, rows, side, dimensions):
    """Share of true mask pixels under each window; (rows, columns)."""
    # Window corners are cut to whole mask pixels, and the window's own size too, as
    # the released Yottixel code does; at least one pixel, and never beyond the mask.
    down, right = mask.shape[0] / dimensions[1], mask.shape[1] / dimensions[0]
    total = np.pad(mask, ((1, 0), (1, 0))).cumsum(0).cumsum(1, dtype=np.int64)
    tall, wide = max(1, int(side * down)), max(1, int(side * right))
    top = np.minimum((rows * down).astype(int), mask.shape[0] - 1)
    left = np.minimum((columns * right).astype(int), mask.shape[1] - 1)
    bottom = np.minimum(top + tall, mask.shape[0])
    far = np.minimum(left + wide, mask.shape[1])
    inside = (
        total[np.ix_(bottom, far)]
        - total[np.ix_(top, far)]
        - total[np.ix_(bottom, left)]
        + total[np.ix_(top, left)]
    )
    return inside / np.outer(bottom - top, far - left)


def _open_file(path):
    if not path.exists():
        raise SlideError(f"{path}: no such file")
    try:
        if openslide.OpenSlide.detect_format(path):
            return openslide.OpenSlide(path)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return np.asarray(Image.open(path).convert("RGB"))
        return _plain_tiff(path)
    except SlideError:
        raise
    except Exception as error:  # each library has its own errors for a bad file
        raise SlideError(
            f"{path.name}: neither OpenSlide nor tifffile can open it "
            f"({type(error).__name__}: {error}). Expected a whole-slide image or a "
            "TIFF; if it should be one, copy it again and compare checksums"
        ) from error


def _plain_tiff(path):
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        if page.imagewidth * page.imagelength > MAX_ARRAY_PIXELS:
            raise SlideError(
                f"{path.name}: {page.imagewidth}×{page.imagelength} px without tiles "
                "is too large to decode whole; convert it to a tiled pyramid "
                "(vips tiffsave IN OUT --tile --pyramid --compression jpeg)"
            )
        pixels = page.asarray()
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, -1)
    if pixels.ndim != 3 or pixels.shape[2] < 3 or pixels.dtype != np.uint8:
        raise SlideError(
            f"{path.name}: {pixels.dtype} {pixels.shape}; expected 8-bit grey or RGB"
        )
    return np.ascontiguousarray(pixels[..., :3])


def _tags_of_openslide(properties):
    found = {}
    # For generic TIFFs OpenSlide's own key is only the resolution tag over again.
    if properties.get("openslide.vendor") != "generic-tiff":
        vendor = _number(properties.get("openslide.mpp-x"))
        found.update({"vendor": vendor} if vendor else {})
    tag = _mpp_of_resolution(
        _number(properties.get("tiff.XResolution")),
        properties.get("tiff.ResolutionUnit", ""),
    )
    found.update({"resolution tag": tag} if tag else {})
    return found, _number(properties.get("openslide.objective-power"))


def _tags_of_image(path):
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return {}  # the resolution of a JPEG is that of a printer
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        if "XResolution" not in page.tags:
            return {}
        per_micrometre = page.get_resolution("MICROMETER")[0]
    return {"resolution tag": 1 / per_micrometre} if per_micrometre > 0 else {}


def _mpp_of_resolution(per_unit, unit):
    micrometres = {"centimeter": 1e4, "inch": 25_400.0}.get(unit.lower())
    return micrometres / per_unit if micrometres and per_unit else None


def _number(text):
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if value > 0 else None


def _on_white(rgba):
    """Composite RGBA on white: OpenSlide returns transparency where nothing is."""
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    share = alpha.astype(np.float32) / 255
    return np.rint(rgba[..., :3] * share + 255 * (1 - share)).astype(np.uint8)


def _crop_on_white(image, x, y, width, height):
    out = np.full((height, width, 3), 255, np.uint8)
    top, left = max(0, y), max(0, x)
    part = image[top : max(top, y + height), left : max(left, x + width)]
    down, right = top - y, left - x
    out[down : down + part.shape[0], right : right + part.shape[1]] = part
    return out
