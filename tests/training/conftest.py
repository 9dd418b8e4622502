"""A small distillation dataset."""

from __future__ import annotations

import pytest

from st_wkl.data.builder import DistillationDatasetBuilder
from st_wkl.data.dataset import DistillationDataset
from tests.helpers.animals import WordOverlap, small_collection


@pytest.fixture(scope="module")
def dataset() -> DistillationDataset:
    builder = DistillationDatasetBuilder(small_collection(), WordOverlap(), num_negatives=4, store=":memory:")
    return builder.build(show_progress=False)
