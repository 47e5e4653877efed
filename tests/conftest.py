"""Before any test module is imported."""

import os

import torch

# Triton reads this when a kernel's module is first imported, which tests of any room may be the first to do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
