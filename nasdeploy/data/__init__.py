"""Image sets as tensors, in memory or in a file: loading, splits, batches, augmentation, accuracy.

Importing this package imports none of Pillow, torchvision and pyarrow.
"""

from __future__ import annotations

from nasdeploy.data.assembly import assemble_dataset
from nasdeploy.data.augment import Augmentation, make_augmentation
from nasdeploy.data.batches import Batch, TrainingBatches, as_input, training_batches
from nasdeploy.data.contents import MEMORY_LIMIT, LabelledImages
from nasdeploy.data.loading import DatasetLoader, dataset_names, load_dataset
from nasdeploy.data.metrics import Accuracy, accuracy_metrics, class_weights, is_unbalanced
from nasdeploy.data.stored import Images, StoredImages, image_chunks
from nasdeploy.data.types import Dataset, Normalisation, Preprocessing, Split

__all__ = [
    "MEMORY_LIMIT",
    "Accuracy",
    "Augmentation",
    "Batch",
    "Dataset",
    "DatasetLoader",
    "Images",
    "LabelledImages",
    "Normalisation",
    "Preprocessing",
    "Split",
    "StoredImages",
    "TrainingBatches",
    "accuracy_metrics",
    "as_input",
    "assemble_dataset",
    "class_weights",
    "dataset_names",
    "image_chunks",
    "is_unbalanced",
    "load_dataset",
    "make_augmentation",
    "training_batches",
]
