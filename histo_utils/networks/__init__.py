"""Networks of the five papers that timm lacks; the rest comes from timm.

* ``attention`` (Yang et al. 2019): ResNet-50 with attention inside
* ``ensemble`` (Yang et al. 2019): learners that share a GoogLeNet
* ``aggregators``, ``fusion``, ``heads`` (LGFFEM 2025): the neck and its heads
* ``published_names``: the LGFFEM authors' parameter names
* ``cbr`` (ours): a small network to train from scratch

All start from PyTorch's default initialisation and take any image size their strides
allow.
"""

from histo_utils.networks.aggregators import GRN, GlobalAggregator, LocalAggregator
from histo_utils.networks.attention import (
    BranchedAttentionResNet50,
    MixedAttentionSEResNet50,
)
from histo_utils.networks.cbr import CBRNet
from histo_utils.networks.ensemble import ABEM
from histo_utils.networks.fusion import LocalGlobalFusionNeck
from histo_utils.networks.heads import GeM, MultiScaleGeMHead

__all__ = [
    "ABEM",
    "GRN",
    "BranchedAttentionResNet50",
    "CBRNet",
    "GeM",
    "GlobalAggregator",
    "LocalAggregator",
    "LocalGlobalFusionNeck",
    "MixedAttentionSEResNet50",
    "MultiScaleGeMHead",
]
