import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def definition():
    """The float64 definition that tests hold every implementation to."""
    spec = importlib.util.spec_from_file_location(
        "nsa_definition", Path(__file__).parents[1] / "kernels" / "definition.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _interpreter(request):
    """The interpreter cannot be switched off again within a process, so machines with a GPU run tests/gpu instead."""
    if "triton" in request.node.name and torch.cuda.is_available():
        pytest.skip("tests/gpu runs the kernels here")
