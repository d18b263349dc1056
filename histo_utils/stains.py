"""Cellularity: the share of an H&E image that is covered by nuclei.

Light is turned into optical density, the haematoxylin part of it is separated,
smoothed over half a micrometre and cut by one threshold. Stains and threshold are
fitted from the image itself or, better, once from many patches of one slide
(`nuclei_threshold`).

The constants were chosen on the 30 training regions of MoNuSeg (40x, 8 organs), without
its 13 test regions. All lengths are in micrometres.

References
----------
.. [1] M. Macenko et al., "A method for normalizing histology slides for quantitative
   analysis", IEEE International Symposium on Biomedical Imaging (ISBI), 2009.
.. [2] N. Otsu, "A threshold selection method from gray-level histograms", IEEE
   Transactions on Systems, Man, and Cybernetics, 1979.
.. [3] A. C. Ruifrok and D. A. Johnston, "Quantification of histochemical staining by
   color deconvolution", Analytical and Quantitative Cytology and Histology, 2001.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.filters import threshold_otsu

from histo_utils import patches

__all__ = [
    "NucleiFit",
    "cellularity",
    "haematoxylin",
    "macenko_stains",
    "nuclei_mask",
    "nuclei_threshold",
]


# Natural-log density per 8-bit value, white = 255; black counts as 1 to stay finite.
_DENSITY = -np.log(np.maximum(np.arange(256), 1) / 255).astype(np.float32)


# Less density than this counts as clear glass, a smaller difference as no contrast.
_FAINT = 0.15


# Median of Macenko's vectors (2 % ends) over the 30 MoNuSeg training regions, for
# images that show no two stains of their own.
_USUAL_STAINS = np.array([[0.53, 0.74, 0.40], [0.21, 0.82, 0.53]])


_MIN_PIXELS = 100  # too few to say where the ends of a distribution lie

_MIN_ANGLE = 5.0  # degrees between stains; 9.5 was the least on training regions

_MAX_SAMPLE = 2**17  # pixels that a fit looks at: more changes nothing but the time


class NucleiFit(NamedTuple):
    """What `nuclei_threshold` found and `nuclei_mask` applies.

    Attributes
    ----------
    stains : (2, 3) array or "hed"
        Unit density vectors (red, green, blue), haematoxylin first; or the fixed
        vectors of scikit-image.
    threshold : float
        Haematoxylin density above which a pixel belongs to a nucleus; infinity if
        the images show nothing to separate.
    smooth : float
        Standard deviation, in micrometres, of the Gaussian the threshold was found
        under.
    """

    stains: np.ndarray | str
    threshold: float
    smooth: float


def _check_image(image: np.ndarray) -> np.ndarray:
    """Return `image` as an array; refuse all but non-empty 8-bit RGB."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            "an 8-bit RGB image (height, width, 3) is needed, got "
            f"{image.dtype} {image.shape}"
        )
    if image.size == 0:
        raise ValueError(f"the image has no pixels: {image.shape}")
    return image


def _pixels(mpp: float, length: float, name: str) -> float:
    """Convert `length` (micrometres) to pixels of `mpp` micrometres each."""
    if not (math.isfinite(mpp) and mpp > 0):
        raise ValueError(f"mpp must be positive micrometres per pixel, got {mpp}")
    if not (math.isfinite(length) and length >= 0):
        raise ValueError(f"{name} must be zero or more, got {length}")
    return length / mpp


def _step(images: Sequence[np.ndarray]) -> int:
    """Row and column step at which all `images` hold at most `_MAX_SAMPLE` pixels."""
    total = sum(image.shape[0] * image.shape[1] for image in images)
    return max(1, math.ceil(math.sqrt(total / _MAX_SAMPLE)))


def macenko_stains(
    image: np.ndarray, faint: float = _FAINT, percent: float = 5.0
) -> np.ndarray:
    """Find the two stains of an H&E image, after Macenko et al. (2009).

    The densities of stained pixels lie near a plane through the origin, between the
    directions of the two stains. The plane is spanned by the two leading singular
    vectors; the stains are the extreme angles in it, up to `percent` at either end.

    Parameters
    ----------
    image : (h, w, 3) or (n, 3) uint8 array
        Image, or pixels pooled from several images. At most about 2**17 pixels of
        an image, on a regular grid, are looked at.
    faint : float
        Pixels with a natural-log density at or below this in any channel are left
        out: their direction is mostly noise.
    percent : float
        Percentage of pixels beyond each extreme angle. 1 is usual; 5 leaves more of
        the noise out and agreed slightly better with the experts on training regions.

    Returns
    -------
    (2, 3) float64 array
        Unit density vectors, haematoxylin first: the one that takes more red light.
        Usual vectors, if fewer than 100 pixels are stained or the two stains are
        less than 5 degrees apart (blank or singly stained images).
    """
    image = np.asarray(image)
    pixels = image if image.ndim == 2 else _check_image(image)
    if image.ndim == 3:
        step = _step([image])
        pixels = image[::step, ::step].reshape(-1, 3)
    density = _DENSITY[pixels].astype(np.float64)
    density = density[(density > faint).all(axis=1)]
    if len(density) < _MIN_PIXELS:
        return _USUAL_STAINS.copy()

    # No mean is taken off: without stain there is no density, so the plane holds the
    # origin. The leading vector of positive data has one sign, which keeps all angles
    # on one side.
    plane = np.linalg.eigh(density.T @ density)[1][:, :0:-1]
    plane[:, 0] *= np.sign(plane[:, 0].sum())
    along = density @ plane
    angles = np.arctan2(along[:, 1], along[:, 0])
    low, high = np.percentile(angles, [percent, 100 - percent])
    if np.degrees(high - low) < _MIN_ANGLE:
        return _USUAL_STAINS.copy()

    ends = np.array([[np.cos(low), np.sin(low)], [np.cos(high), np.sin(high)]])
    stains = ends @ plane.T
    return stains[np.argsort(-stains[:, 0])]


def haematoxylin(image: np.ndarray, stains: np.ndarray | str = "macenko") -> np.ndarray:
    """Haematoxylin density of every pixel.

    Parameters
    ----------
    image : (h, w, 3) uint8 array
        RGB image.
    stains : "macenko", "hed" or (2, 3) array
        Vectors fitted to this image; the fixed vectors of Ruifrok and Johnston (2001)
        as scikit-image has them; or given ones, haematoxylin first.

    Returns
    -------
    (h, w) float array
        Density along the haematoxylin vector, natural log, least squares over the
        three channels; slightly negative where a pixel is redder than eosin. With
        "hed" it is ``skimage.color.rgb2hed(image)[..., 0]``, in that function's own
        scale and never negative.
    """
    image = _check_image(image)
    if isinstance(stains, str):
        if stains == "hed":
            return rgb2hed(image)[..., 0]
        if stains != "macenko":
            raise ValueError(f'stains must be "macenko", "hed" or vectors: {stains!r}')
        stains = macenko_stains(image)
    stains = np.asarray(stains, dtype=np.float64)
    if stains.shape != (2, 3) or not np.isfinite(stains).all():
        raise ValueError(f"stains must be a finite (2, 3) array, got {stains.shape}")
    weights = np.linalg.pinv(stains)[:, 0].astype(np.float32)
    return _DENSITY[image] @ weights


def _smoothed(image: np.ndarray, stains: np.ndarray | str, sigma: float) -> np.ndarray:
    """Haematoxylin density after a Gaussian of `sigma` pixels (none if zero)."""
    density = haematoxylin(image, stains)
    return ndimage.gaussian_filter(density, sigma) if sigma > 0 else density


def nuclei_threshold(
    images: Sequence[np.ndarray],
    mpp: float = 0.25,
    *,
    stains: np.ndarray | str = "macenko",
    smooth: float = 0.5,
) -> NucleiFit:
    """Fit stains and Otsu's threshold (1979) once for all `images`.

    Only tissue takes part: pixels whose mean density over the channels is above 0.15.
    With the white ground in, the threshold would part glass from tissue instead.

    Parameters
    ----------
    images : sequence of (h, w, 3) uint8 arrays
        RGB images of one stain batch, as the patches of a slide; sizes may differ.
    mpp : float
        Micrometres per pixel of all of them.
    stains : "macenko", "hed" or (2, 3) array
        See `haematoxylin`; "macenko" fits the pixels of all images together.
    smooth : float
        Standard deviation of the Gaussian over the density, micrometres.

    Returns
    -------
    NucleiFit
        The threshold is infinite, so that no nuclei are found, where fewer than 100
        pixels are tissue, or where the two sides of it differ by less than 0.15 in
        mean red density. Haematoxylin takes red light and eosin hardly any; the least
        difference on MoNuSeg's training regions was 0.27.
    """
    images = [_check_image(image) for image in images]
    if not images:
        raise ValueError("at least one image is needed")
    sigma = _pixels(mpp, smooth, "smooth")
    step = _step(images)
    thin = [image[::step, ::step].reshape(-1, 3) for image in images]
    pooled = np.concatenate(thin)
    if isinstance(stains, str) and stains == "macenko":
        stains = macenko_stains(pooled)

    density = _DENSITY[pooled]
    tissue = density.mean(axis=1) > _FAINT
    red = density[tissue, 0]
    amount = np.concatenate(
        [_smoothed(image, stains, sigma)[::step, ::step].ravel() for image in images]
    )[tissue]
    nothing = NucleiFit(stains, math.inf, smooth)
    if len(amount) < _MIN_PIXELS or amount.min() == amount.max():
        return nothing
    threshold = float(threshold_otsu(amount))
    above = amount > threshold
    if red[above].mean() - red[~above].mean() < _FAINT:
        return nothing
    return NucleiFit(stains, threshold, smooth)


def _fill_holes(mask: np.ndarray, size: float) -> np.ndarray:
    """Fill holes of less than `size` pixels; what meets the border is no hole."""
    labels, count = ndimage.label(~mask)
    if count == 0 or size <= 0:
        return mask
    small = np.bincount(labels.ravel()) < size
    small[0] = False
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        small[edge] = False
    return mask | small[labels]


def nuclei_mask(
    image: np.ndarray,
    mpp: float = 0.25,
    fit: NucleiFit | None = None,
    *,
    holes: float = 25.0,
) -> np.ndarray:
    """Mark the pixels that belong to nuclei.

    Parameters
    ----------
    image : (h, w, 3) uint8 array
        RGB image.
    mpp : float
        Micrometres per pixel.
    fit : NucleiFit, optional
        From `nuclei_threshold` over the slide's patches. Without it the image is
        fitted alone, which finds the darkest structures of any tissue: an image that
        has tissue but no nuclei needs the fit of others that have.
    holes : float
        Holes of less than this area, square micrometres, are filled: less than a
        nucleus, so the pale middle of a vesicular one. Zero fills none.

    Returns
    -------
    (h, w) bool array
        True on nuclei.
    """
    image = _check_image(image)
    if fit is None:
        fit = nuclei_threshold([image], mpp)
    area = _pixels(mpp, _pixels(mpp, holes, "holes"), "holes")
    sigma = _pixels(mpp, fit.smooth, "smooth")
    if fit.threshold == math.inf:
        return np.zeros(image.shape[:2], dtype=bool)
    return _fill_holes(_smoothed(image, fit.stains, sigma) > fit.threshold, area)


def cellularity(
    image: np.ndarray,
    mpp: float = 0.25,
    fit: NucleiFit | None = None,
    *,
    stains: np.ndarray | str = "macenko",
    threshold: float | str = "otsu",
    smooth: float = 0.5,
    holes: float = 25.0,
) -> float:
    """Share of the image's area that is nuclei.

    Parameters
    ----------
    image : (h, w, 3) uint8 array
        RGB image.
    mpp : float
        Micrometres per pixel.
    fit : NucleiFit, optional
        From `nuclei_threshold`; `stains`, `threshold` and `smooth` are then its own.
    stains : "macenko", "hed" or (2, 3) array
        See `haematoxylin`.
    threshold : "otsu" or float
        Fitted to this image, or a density given in the scale of `stains`.
    smooth : float
        Standard deviation of the Gaussian over the density, micrometres.
    holes : float
        Holes up to this area, square micrometres, count as nucleus.

    Returns
    -------
    float
        Between 0 and 1; the ground counts in the whole. 0 for a blank image.
    """
    if fit is None and threshold == "otsu":
        fit = nuclei_threshold([image], mpp, stains=stains, smooth=smooth)
    elif fit is None:
        if isinstance(threshold, str) or math.isnan(threshold):
            raise ValueError(f'threshold must be "otsu" or a number: {threshold!r}')
        if isinstance(stains, str) and stains == "macenko":
            stains = macenko_stains(image)
        fit = NucleiFit(stains, float(threshold), smooth)
    return float(nuclei_mask(image, mpp, fit, holes=holes).mean())


_DENSITY_64 = -np.log(np.maximum(np.arange(256), 1) / 255)  # natural log, white = 0

_MIN_SCALE = 0.05  # 99th percentile of a stain's amount below which it is not there

_MIN_FITTED = 100

_FIT_PIXELS = 2**17  # pixels a slide's fit looks at


class StainFit(NamedTuple):
    """Stains of one slide.

    Attributes
    ----------
    stains : (2, 3) array
        Unit density vectors, haematoxylin first.
    scale : (2,) array
        99th percentile of each stain's amount over tissue pixels.
    degenerate : bool
        Two stains could not be told apart, or one is not there.
    """

    stains: np.ndarray
    scale: np.ndarray
    degenerate: bool


def fit_stains(images) -> StainFit:
    """Fit stain vectors and amounts to images of **one slide** (Macenko et al. 2009).

    Parameters
    ----------
    images : sequence of (h, w, 3) uint8 arrays
        Only tissue takes part: pixels whose mean density is above 0.15.

    Examples
    --------
    >>> fit_stains([np.full((32, 32, 3), 255, np.uint8)]).degenerate
    True
    """
    total = sum(image.shape[0] * image.shape[1] for image in images)
    step = max(1, math.ceil(math.sqrt(total / _FIT_PIXELS)))
    pixels = np.concatenate([image[::step, ::step].reshape(-1, 3) for image in images])
    pixels = pixels[_DENSITY_64[pixels].mean(axis=1) > _FAINT]
    stains = macenko_stains(pixels)
    # Where nothing can be fitted, macenko_stains gives its usual vectors back.
    usual = macenko_stains(np.empty((0, 3), np.uint8))
    if len(pixels) < _MIN_FITTED:
        return StainFit(stains, np.ones(2), True)
    amounts = _DENSITY_64[pixels] @ np.linalg.pinv(stains)
    scale = np.percentile(amounts, 99, axis=0)
    alone = np.array_equal(stains, usual) or bool((scale < _MIN_SCALE).any())
    return StainFit(stains, scale, alone)


@dataclass(frozen=True)
class StainMatch:
    """Give every slide the stains of a target, after Macenko et al. 2009.

    Stain vectors and the scale of the amounts are fitted once a **slide**, not a tile:
    fitted tile by tile, a tile without nuclei would be painted until it had some.
    Slides whose fit is degenerate, and tiles without tissue, come back untouched;
    `degenerate` and `untouched` tell.

    Parameters
    ----------
    fits : mapping of slide name to StainFit
    target : StainFit
    """

    fits: Mapping[str, StainFit]
    target: StainFit
    _maps: dict = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if self.target.degenerate:
            raise ValueError(
                "the target's stains are degenerate (blank or singly stained); choose "
                "a slide with both haematoxylin and eosin"
            )
        maps = {
            slide: (np.linalg.pinv(fit.stains) * (self.target.scale / fit.scale))
            @ self.target.stains
            for slide, fit in self.fits.items()
            if not fit.degenerate
        }
        object.__setattr__(self, "_maps", maps)

    @classmethod
    def fit(cls, table, target=None, n_patches=32):
        """Fit every slide of a patch table.

        Parameters
        ----------
        table : pandas.DataFrame
            A patch table.
        target : str or StainFit, optional
            A slide of the table, or a fit of another; default: the median over the
            table's slides. Take it from training slides.
        n_patches : int
            So many patches of a slide, evenly through its rows, are read.

        Raises
        ------
        ValueError
            An unknown target, or no slide with two stains.
        """
        fits = {}
        for slide, rows in table.groupby("slide", sort=True):
            every = np.linspace(0, len(rows) - 1, min(n_patches, len(rows)))
            some = rows.iloc[np.unique(every.round().astype(int))].to_dict("records")
            fits[slide] = fit_stains([patches.read_patch(row) for row in some])
        if isinstance(target, str):
            if target not in fits:
                raise ValueError(
                    f"target {target!r} is not a slide of the table; it has "
                    f"{', '.join(list(fits)[:3])}, …"
                )
            target = fits[target]
        return cls(fits, _median(fits) if target is None else target)

    @property
    def degenerate(self):
        """Names of the slides that are left as they are."""
        return tuple(slide for slide, fit in self.fits.items() if fit.degenerate)

    @property
    def identity(self):
        """A name that differs where the result would; part of a cache's key."""
        digest = hashlib.sha1()
        for slide, fit in sorted(self.fits.items()):
            digest.update(f"{slide} {fit.degenerate}".encode())
            digest.update(np.concatenate([fit.stains.ravel(), fit.scale]).tobytes())
        for part in self.target[:2]:
            digest.update(np.asarray(part, float).tobytes())
        return f"stain-matched-{digest.hexdigest()[:12]}"

    def untouched(self, image, slide):
        """Whether this tile would come back as it is."""
        if slide not in self.fits:
            raise ValueError(
                f"slide {slide!r} was not fitted ({len(self.fits)} were); fit on a "
                "table that holds it"
            )
        glass = not (_DENSITY_64[image].mean(axis=-1) > _FAINT).any()
        return self.fits[slide].degenerate or glass

    def __call__(self, image, slide):
        """Return the tile in the target's stains, uint8 (h, w, 3)."""
        if self.untouched(image, slide):
            return image
        density = _DENSITY_64[image] @ self._maps[slide]
        return np.clip(np.rint(255 * np.exp(-density)), 0, 255).astype(np.uint8)


def _median(fits):
    good = [fit for fit in fits.values() if not fit.degenerate]
    if not good:
        raise ValueError(
            f"none of {len(fits)} slides shows two stains; stain matching needs H&E"
        )
    stains = np.median([fit.stains for fit in good], axis=0)
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    return StainFit(stains, np.median([fit.scale for fit in good], axis=0), False)
