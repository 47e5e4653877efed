import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def definition():
    """The float64 definition that tests hold every implementation to."""
    spec = importlib.util.spec_from_file_location(
        "nsa_definition", Path(__file__).parents[1] / "kernels" / "definition.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
