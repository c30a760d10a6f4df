"""The sizes of tests/kvruntime/test_engine_linear.py's ``test_product``, called and awaited one by one.

Prints the largest error where there is no activation.

compute-sanitizer --tool racecheck --kernel-name kns=stream_kernel --kernel-name kns=product_kernel \
    python3 products-racecheck.py any|hopper
"""

import sys

import torch

from kvruntime.engine import hopper, product

SIZES = [(1, 130, 96), (5, 37, 768), (8, 64, 640), (16, 130, 96), (33, 70, 200), (64, 64, 256), (100, 40, 256)]
SIZES += [(3, 20, 2000), (70, 40, 2000)] + [(m, n, k) for m in (8, 64, 128) for n, k in ((2304, 768), (768, 3072))]
if sys.argv[1] == "any":
    hopper.supports = lambda x, weight: False
for m, n, k in SIZES:
    for activation in (None, "gelu", "silu", "parts"):
        halves = 2 if activation == "silu" else 1
        x, w = torch.randn(m, k).half().cuda(), (torch.randn(halves * n, k) * k**-0.5).half().cuda()
        print(sys.argv[1], m, n, k, activation, end=" ", flush=True)
        y = product.parts(x, w).sum(0) if activation == "parts" else product.product(x, w, None, activation)
        torch.cuda.synchronize()
        if activation in (None, "parts"):
            print(f"{(y.double().cpu() - x.double().cpu() @ w.double().cpu().T).abs().max().item():.1e}", end=" ")
        print("ok", flush=True)
