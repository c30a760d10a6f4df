"""A fault of each kind that compute-sanitizer is to find, so that ``validation/record.sh`` knows that it looks.

``python tests/support/faults.py memcheck`` stores right behind a tensor; with ``racecheck`` all threads write one
shared word.  Without the tool both end well.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

RACE = tl.constexpr(
    "{ .reg .b32 at; .shared .align 4 .b32 word[1]; mov.u32 at, word; st.shared.b32 [at], $1; ld.shared.b32 $0, [at]; }"
)


@triton.jit
def faulty_kernel(x_ptr, out_ptr, offset, RACING: tl.constexpr):
    place = tl.arange(0, 128)
    x = tl.load(x_ptr + place)
    if RACING:
        x = tl.inline_asm_elementwise(RACE, "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(out_ptr + offset + place, x)


if __name__ == "__main__":
    racing = {"memcheck": False, "racecheck": True}[sys.argv[1]]
    x = torch.arange(128, dtype=torch.int32, device="cuda")
    faulty_kernel[(1,)](x, torch.empty_like(x), 0 if racing else len(x), RACING=racing, num_warps=4)
    torch.cuda.synchronize()
