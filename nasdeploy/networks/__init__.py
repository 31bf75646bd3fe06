"""Networks of torch: layers, the stand-alone network of an architecture, and the supernet that shares weights."""

from nasdeploy.networks.network import Network, Normalise, build_network
from nasdeploy.networks.operations import LAYER_KINDS, build_layer
from nasdeploy.networks.supernet import Supernet

__all__ = ["LAYER_KINDS", "Network", "Normalise", "Supernet", "build_layer", "build_network"]
