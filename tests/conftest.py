"""Without a CUDA device the Triton kernels run in Triton's interpreter; it must be chosen before they are imported."""

import os

try:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
except ImportError:
    pass
