"""Without a CUDA device the Triton kernels run in Triton's interpreter; it must be chosen before they are imported.

Hypothesis measures no time: a slow, loaded machine finds what a fast one finds.
"""

import os

try:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
except ImportError:
    pass

try:
    from hypothesis import HealthCheck, settings

    settings.register_profile("kvsim", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("kvsim")
except ImportError:
    pass
