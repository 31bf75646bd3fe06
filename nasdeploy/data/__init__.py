"""Image sets as tensors in memory: loading, splits, batches, augmentation, accuracy.

Importing this package imports neither Pillow nor torchvision.
"""

from __future__ import annotations

from nasdeploy.data.assembly import LabelledImages, assemble_dataset
from nasdeploy.data.augment import Augmentation, make_augmentation
from nasdeploy.data.batches import Batch, TrainingBatches, as_input, evaluation_batches, training_batches
from nasdeploy.data.loading import DatasetLoader, dataset_names, load_dataset
from nasdeploy.data.metrics import Accuracy, accuracy_metrics, is_unbalanced
from nasdeploy.data.types import Dataset, Normalisation, Preprocessing, Split

__all__ = [
    "Accuracy",
    "Augmentation",
    "Batch",
    "Dataset",
    "DatasetLoader",
    "LabelledImages",
    "Normalisation",
    "Preprocessing",
    "Split",
    "TrainingBatches",
    "accuracy_metrics",
    "as_input",
    "assemble_dataset",
    "dataset_names",
    "evaluation_batches",
    "is_unbalanced",
    "load_dataset",
    "make_augmentation",
    "training_batches",
]
