from __future__ import annotations

import pytest

from benchmarks.model_import import make_checkpoint
from dim.model import released


@pytest.mark.parametrize("parameters", [4e6, 8e6, 20e6])
def test_the_checkpoint_is_a_whole_one_of_about_the_size_asked_for(tmp_path, parameters):
    file = tmp_path / "model.safetensors"
    make_checkpoint(file, parameters, "BF16")
    _, painter = released.load(file, task="edit")
    size = sum(parameter.numel() for parameter in painter.parameters())
    assert parameters * 0.7 < size < parameters * 1.3
