"""Images of one resolution out of those of a larger one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize(images: Tensor, size: int) -> Tensor:
    """Return pixels (B, C, s, s), float, 0..255, as (B, C, size, size); those of that size as they are.

    Bilinear with a support that widens with the factor: Pillow's bilinear filter, by which images are loaded, but for
    its rounding to whole grey levels. (Averaging areas is slower and further from it by a factor of ten.)
    """
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
