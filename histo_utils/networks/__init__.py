"""Networks of the five papers that timm lacks; the rest comes from timm.

All start from PyTorch's default initialisation and take any image size their strides
allow.
"""

from histo_utils.networks.attention import (
    BranchedAttentionResNet50,
    MixedAttentionSEResNet50,
)
from histo_utils.networks.cbr import CBRNet
from histo_utils.networks.ensemble import ABEM
from histo_utils.networks.fusion import (
    GRN,
    Fusion,
    GeM,
    LocalGlobalFusionNeck,
    MultiScaleGeMHead,
)
from histo_utils.networks.projected import Joined, Pooled, Projected

__all__ = [
    "ABEM", "GRN", "BranchedAttentionResNet50", "CBRNet", "Fusion", "GeM", "Joined",
    "LocalGlobalFusionNeck", "MixedAttentionSEResNet50", "MultiScaleGeMHead", "Pooled",
    "Projected",
]  # fmt: skip
