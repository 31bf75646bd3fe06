"""Models of the loss that need torch: architectures as graphs, read by a pretrained encoder.

Notation: n graphs of N nodes, V operations, R roles, P numbers of an embedding, M heads; D decisions of at most C
candidates.
"""

from nasdeploy.predictors.encoder import AutoencoderSize, GraphAutoencoder
from nasdeploy.predictors.graph import GraphPredictor, GraphPredictors, graph_rung
from nasdeploy.predictors.heads import HeadSettings
from nasdeploy.predictors.pretraining import PretrainingSettings, Reconstruction, pretrain, reconstruction

__all__ = [
    "AutoencoderSize",
    "GraphAutoencoder",
    "GraphPredictor",
    "GraphPredictors",
    "HeadSettings",
    "PretrainingSettings",
    "Reconstruction",
    "graph_rung",
    "pretrain",
    "reconstruction",
]
