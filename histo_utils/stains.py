"""Stains of H&E: Macenko's vectors, nuclei, cellularity, stain matching.

*Cellularity* is the share of an image that nuclei cover. Light is turned into optical
density, the haematoxylin part of it is separated, smoothed over half a micrometre and
cut by one threshold. Stains and threshold are fitted to the image itself or, better,
once to many patches of one slide (`nuclei_threshold`). The constants were chosen on the
30 training regions of MoNuSeg (40x, 8 organs), without its test regions.

Sources: Macenko et al., ISBI 2009; Otsu, IEEE Trans. Systems, Man, and Cybernetics,
1979; Ruifrok and Johnston, Analytical and Quantitative Cytology and Histology, 2001.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.filters import threshold_otsu
from skimage.segmentation import clear_border

from histo_utils import patches

# Natural-log density per 8-bit value, white = 255; black counts as 1 to stay finite.
DENSITY = -np.log(np.maximum(np.arange(256), 1) / 255)
DENSITY_32 = DENSITY.astype(np.float32)  # for whole images: half the memory
FAINT = 0.15  # less density than this is clear glass, a smaller difference no contrast
# Median of Macenko's vectors (2 % ends) over the 30 MoNuSeg training regions, for
# images that show no two stains of their own.
USUAL_STAINS = np.array([[0.53, 0.74, 0.40], [0.21, 0.82, 0.53]])
MIN_PIXELS = 100  # fewer do not say where the ends of a distribution lie
MIN_ANGLE = 5.0  # degrees between stains; 9.5 was the least on training regions
MIN_SCALE = 0.05  # 99th percentile of a stain's amount below which it is not there
MAX_SAMPLE = 2**17  # pixels that a fit looks at: more changes nothing but the time


class NucleiFit(NamedTuple):
    """What `nuclei_threshold` found and `nuclei_mask` applies."""

    stains: np.ndarray | str  # (2, 3) unit density vectors, haematoxylin first; "hed"
    threshold: float  # haematoxylin density of nuclei; infinite: none
    smooth: float  # µm, standard deviation of the Gaussian before the threshold


class StainFit(NamedTuple):
    """Stains of one slide."""

    stains: np.ndarray  # (2, 3) unit density vectors, haematoxylin first
    scale: np.ndarray  # (2,) 99th percentile of each stain's amount over tissue
    degenerate: bool  # there are no two different stains


def macenko_stains(image, percent=5.0) -> np.ndarray:
    """Two stains (2, 3) of an image or pixels (n, 3) uint8; Macenko et al. (2009).

    Unit density vectors, haematoxylin first, at ``percent`` from either end of the
    angles (usual: 1; 5 agreed slightly better with the experts on training regions).
    `USUAL_STAINS` if fewer than 100 pixels are stained or the two lie within 5 degrees.
    """
    pixels = np.asarray(image)
    if pixels.ndim != 2:
        pixels = _sample([_check_image(image)])[0]
    density = DENSITY_32[pixels].astype(np.float64)
    # The direction of faint pixels is mostly noise.
    density = density[(density > FAINT).all(axis=1)]
    if len(density) < MIN_PIXELS:
        return USUAL_STAINS.copy()
    # No mean is taken off: without stain there is no density, so the plane holds the
    # origin. The leading vector of positive data has one sign, which keeps all angles
    # on one side.
    plane = np.linalg.eigh(density.T @ density)[1][:, :0:-1]
    plane[:, 0] *= np.sign(plane[:, 0].sum())
    along = density @ plane
    angles = np.arctan2(along[:, 1], along[:, 0])
    low, high = np.percentile(angles, [percent, 100 - percent])
    if np.degrees(high - low) < MIN_ANGLE:
        return USUAL_STAINS.copy()
    ends = np.array([[np.cos(low), np.sin(low)], [np.cos(high), np.sin(high)]])
    stains = ends @ plane.T
    return stains[np.argsort(-stains[:, 0])]  # haematoxylin takes more red light


def haematoxylin(image, stains="macenko") -> np.ndarray:
    """Haematoxylin density (h, w), natural log, least squares over the channels.

    ``stains``: vectors (2, 3), haematoxylin first; ``"macenko"``: fitted to the image;
    ``"hed"``: scikit-image's `rgb2hed` (Ruifrok and Johnston 2001), in its own scale.
    """
    image = _check_image(image)
    if isinstance(stains, str) and stains == "hed":
        return rgb2hed(image)[..., 0]
    if isinstance(stains, str) and stains != "macenko":
        raise ValueError(f'stains must be "macenko", "hed" or vectors: {stains!r}')
    stains = macenko_stains(image) if isinstance(stains, str) else stains
    stains = np.asarray(stains, dtype=np.float64)
    if stains.shape != (2, 3) or not np.isfinite(stains).all():
        raise ValueError(f"stains must be a finite (2, 3) array, got {stains.shape}")
    return DENSITY_32[image] @ np.linalg.pinv(stains)[:, 0].astype(np.float32)


def nuclei_threshold(images, mpp=0.25, *, stains="macenko", smooth=0.5) -> NucleiFit:
    """Fit stains and Otsu's threshold (1979) once to all ``images`` of one slide.

    Only tissue takes part (mean density above 0.15); with glass, the threshold would
    part glass from tissue. It is infinite, so that no nuclei are found, for fewer than
    100 tissue pixels or if its two sides differ by less than 0.15 in mean red density:
    haematoxylin takes red light and eosin hardly any (least on MoNuSeg's training
    regions: 0.27).
    """
    images = [_check_image(image) for image in images]
    if not images:
        raise ValueError("at least one image is needed")
    pixels, step = _sample(images)
    if isinstance(stains, str) and stains == "macenko":
        stains = macenko_stains(pixels)
    density = DENSITY_32[pixels]
    tissue = density.mean(axis=1) > FAINT
    smoothed = [_smoothed(image, stains, mpp, smooth) for image in images]
    amount = np.concatenate([a[::step, ::step].ravel() for a in smoothed])[tissue]
    nothing = NucleiFit(stains, math.inf, smooth)
    if len(amount) < MIN_PIXELS or amount.min() == amount.max():
        return nothing
    threshold = float(threshold_otsu(amount))
    above, red = amount > threshold, density[tissue, 0]
    if red[above].mean() - red[~above].mean() < FAINT:
        return nothing
    return NucleiFit(stains, threshold, smooth)


def nuclei_mask(image, mpp=0.25, fit=None, *, holes=25.0) -> np.ndarray:
    """Mark the pixels that belong to nuclei.

    Parameters
    ----------
    image : (h, w, 3) uint8 array
        RGB image.
    mpp : float
        µm per pixel.
    fit : NucleiFit, optional
        From `nuclei_threshold` over the slide's patches. Without it the image is
        fitted alone, which finds the darkest structures of any tissue: an image that
        has tissue but no nuclei needs the fit of others that have.
    holes : float
        Holes of less than this area (µm²) are filled: less than a nucleus, so the pale
        middle of a vesicular one. Zero fills none.

    Returns
    -------
    (h, w) bool array
        True on nuclei.

    Raises
    ------
    ValueError
        An image that is empty or not 8-bit RGB; mpp, holes or smoothing out of range.
    """
    image = _check_image(image)
    if fit is None:
        fit = nuclei_threshold([image], mpp)
    area = _pixels(mpp, _pixels(mpp, holes, "holes"), "holes")
    if fit.threshold == math.inf:
        return np.zeros(image.shape[:2], dtype=bool)
    mask = _smoothed(image, fit.stains, mpp, fit.smooth) > fit.threshold
    inner = clear_border(ndimage.label(~mask)[0])  # what meets the border is no hole
    small = np.bincount(inner.ravel()) < area
    small[0] = False
    return mask | small[inner]


def cellularity(image, mpp=0.25, fit=None) -> float:
    """Share of the image's area that is nuclei.

    Parameters
    ----------
    image, mpp, fit
        As `nuclei_mask`.

    Returns
    -------
    float
        Between 0 and 1; glass counts in the whole. 0 for a blank image.
    """
    return float(nuclei_mask(image, mpp, fit).mean())


def fit_stains(images) -> StainFit:
    """Fit vectors and amounts to the tissue of one slide's images (Macenko 2009)."""
    pixels = _sample(images)[0]
    pixels = pixels[DENSITY[pixels].mean(axis=1) > FAINT]
    stains = macenko_stains(pixels)
    if len(pixels) < MIN_PIXELS:
        return StainFit(stains, np.ones(2), True)
    amounts = DENSITY[pixels] @ np.linalg.pinv(stains)
    scale = np.percentile(amounts, 99, axis=0)
    one = np.array_equal(stains, USUAL_STAINS) or bool((scale < MIN_SCALE).any())
    return StainFit(stains, scale, one)


class StainMatch:
    """Give every slide the stains of a target; ``match(image, slide)`` -> uint8.

    Vectors and scale are fitted once per *slide* (``fits``: slide name to `StainFit`):
    fitted per tile, a tile without nuclei would be painted until it had some. Slides
    whose fit is degenerate, and tiles without tissue, are returned as they are.
    """

    def __init__(self, fits, target):
        if target.degenerate:
            raise ValueError(
                "the target's stains are degenerate (blank or singly stained); choose "
                "a slide with both haematoxylin and eosin"
            )
        self.fits, self.target = dict(fits), target
        self.degenerate = tuple(slide for slide, fit in fits.items() if fit.degenerate)
        self._maps = {
            slide: np.linalg.pinv(fit.stains)
            * (target.scale / fit.scale)
            @ target.stains
            for slide, fit in fits.items()
            if not fit.degenerate
        }

    @classmethod
    def fit(cls, table, target=None, n_patches=32):
        """Fit every slide of a patch table, each to ``n_patches`` spread over its rows.

        ``target`` is a slide of the table or a `StainFit`; default: the median over the
        slides. Take it from training slides.
        """
        fits = {}
        for slide, rows in table.groupby("slide", sort=True):
            places = np.linspace(0, len(rows) - 1, min(n_patches, len(rows)))
            some = rows.iloc[np.unique(places.round().astype(int))].to_dict("records")
            fits[slide] = fit_stains([patches.read_patch(row) for row in some])
        if isinstance(target, str) and target not in fits:
            raise ValueError(
                f"target {target!r} is not a slide of the table; it has "
                f"{', '.join(list(fits)[:3])}, …"
            )
        if target is None:
            good = [fit for fit in fits.values() if not fit.degenerate]
            if not good:
                raise ValueError(
                    f"none of {len(fits)} slides shows two stains; stain matching "
                    "needs H&E"
                )
            stains = np.median([fit.stains for fit in good], axis=0)
            stains /= np.linalg.norm(stains, axis=1, keepdims=True)
            scale = np.median([fit.scale for fit in good], axis=0)
            target = StainFit(stains, scale, False)
        return cls(fits, fits[target] if isinstance(target, str) else target)

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

    def __call__(self, image, slide):
        """Return the tile (h, w, 3) uint8 in the target's stains."""
        if slide not in self.fits:
            raise ValueError(
                f"slide {slide!r} was not fitted ({len(self.fits)} were); fit on a "
                "table that holds it"
            )
        density = DENSITY[image]
        if self.fits[slide].degenerate or not (density.mean(axis=-1) > FAINT).any():
            return image
        light = 255 * np.exp(-(density @ self._maps[slide]))
        return np.clip(np.rint(light), 0, 255).astype(np.uint8)


def _check_image(image):
    """Return ``image`` as an array; refuse all but non-empty 8-bit RGB."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"an 8-bit RGB image (height, width, 3) is needed, got {image.dtype} "
            f"{image.shape}"
        )
    if image.size == 0:
        raise ValueError(f"the image has no pixels: {image.shape}")
    return image


def _pixels(mpp, length, name):
    """Convert a length in µm to pixels."""
    if not (math.isfinite(mpp) and mpp > 0):
        raise ValueError(f"mpp must be positive µm per pixel, got {mpp}")
    if not (math.isfinite(length) and length >= 0):
        raise ValueError(f"{name} must be zero or more, got {length}")
    return length / mpp


def _sample(images):
    """Pixels (n, 3) on a regular grid over all images, at most 2**17; and its step."""
    total = sum(image.shape[0] * image.shape[1] for image in images)
    step = max(1, math.ceil(math.sqrt(total / MAX_SAMPLE)))
    return np.concatenate([im[::step, ::step].reshape(-1, 3) for im in images]), step


def _smoothed(image, stains, mpp, smooth):
    """Haematoxylin density after a Gaussian of ``smooth`` µm (none if zero)."""
    sigma = _pixels(mpp, smooth, "smooth")
    density = haematoxylin(image, stains)
    return ndimage.gaussian_filter(density, sigma) if sigma > 0 else density
