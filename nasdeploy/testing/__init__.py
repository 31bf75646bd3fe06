"""What every profile, data set, search space and exporter must keep to, as test classes to inherit.

A package that brings a part tests it with a few lines, and pytest finds the rest::

    class TestMySpace(SpaceContract):
        def factory(self, image_shape, num_classes):
            return my_space(image_shape, num_classes)

Nothing here needs pytest itself, and a test fails with AssertionError and a message that says what is wrong.
"""

from __future__ import annotations

from nasdeploy.testing.datasets import DatasetContract
from nasdeploy.testing.exporters import ExporterContract
from nasdeploy.testing.profiles import ProfileContract
from nasdeploy.testing.spaces import SpaceContract

__all__ = ["DatasetContract", "ExporterContract", "ProfileContract", "SpaceContract"]
