"""Image sets that come with the package, each with its licence beside it.

``fashion_mnist_12k.npz``: 1 000 training and 200 test images of each class of Fashion-MNIST (Xiao, Rasul,
Vollgraf, 2017; MIT), unchanged; ``examples/make_embedded_fashion_mnist.py`` makes it from the original.
"""

from __future__ import annotations

from pathlib import Path

FASHION_MNIST = Path(__file__).with_name("fashion_mnist_12k.npz")
