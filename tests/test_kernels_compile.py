"""Every kernel compiles for sm_80, sm_89, sm_90 and sm_100 without a GPU, and none spills a register."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kvruntime.kivi import attention, quantize  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Kivi, kivi_seed  # noqa: E402

TARGETS = (80, 89, 90, 100)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

METHODS = {
    "2-bit g32 d64": (Kivi(), 64),
    "2-bit g32 d128": (Kivi(), 128),
    "2-bit g64 d128": (Kivi(group_size=64), 128),
    "2-bit g128 d128": (Kivi(group_size=128), 128),
    "4-bit g64 d128": (Kivi(nbits=4, group_size=64), 128),
    "8-bit g32 d64": (Kivi(nbits=8), 64),
    "3-bit g32 d96": (Kivi(nbits=3), 96),
    "k4v2 gv16 d80": (Kivi(key_nbits=4, value_nbits=2, value_group_size=16), 80),
    "2-bit g32 d256": (Kivi(), 256),
    "seed d64": (kivi_seed(), 64),
}


def compiled(kernel, types: dict[str, str], constants: dict[str, object], sm: int, num_warps: int):
    """The kernel for compute capability ``sm`` (90 = sm_90); pointers and strides 16-byte aligned as PyTorch's are."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = constants | {name: None for name in kernel.arg_names if name not in types and name not in constants}
    attrs = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if types.get(name, "").startswith("*") or name.startswith("stride")
    }
    source = ASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": num_warps})


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """REG, STACK, SHARED ... as the CUDA binary states them."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run([tools / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {key: int(value) for key, value in (pair.split(":") for pair in line.split() if pair.count(":") == 1)}


def pointers(kernel, dtype: str, fixed: dict[str, str]) -> dict[str, str]:
    """Argument types: pointers of ``dtype`` unless ``fixed`` says otherwise, scalars i32."""
    return {
        name: fixed.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if not name.isupper()
    }


@pytest.mark.parametrize("sm", TARGETS)
@pytest.mark.parametrize("name", METHODS)
def test_pack(name: str, sm: int, tmp_path: Path) -> None:
    method, dim = METHODS[name]
    record = method.record(LayerShape(8, dim, dim))
    fixed = {"records_ptr": "*i32", "params_ptr": "*fp16", "lengths_ptr": "*i32", "counts_ptr": "*i32"}
    types = pointers(quantize.pack_kernel, "fp16", fixed)
    constants = quantize.record_constants(record) | {
        "NUM_HEADS": 8, "NEW": True, "SINK": method.sink_length, "RESIDUAL": method.residual_length,
    }  # fmt: skip
    used = resources(compiled(quantize.pack_kernel, types, constants, sm, 4).asm["cubin"], tmp_path)
    assert used["STACK"] == 0, used


@pytest.mark.parametrize("sm", TARGETS)
def test_store(sm: int, tmp_path: Path) -> None:
    types = pointers(quantize.store_kernel, "bf16", {"lengths_ptr": "*i32", "counts_ptr": "*i32"})
    constants = {
        "NUM_HEADS": 8, "KEY_DIM": 96, "VALUE_DIM": 96, "RECORD": 64, "SINK": 4, "RESIDUAL": 128, "BLOCK_T": 16, "BLOCK_D": 128,
    }  # fmt: skip
    used = resources(compiled(quantize.store_kernel, types, constants, sm, 4).asm["cubin"], tmp_path)
    assert used["STACK"] == 0, used


@pytest.mark.parametrize("sm", TARGETS)
@pytest.mark.parametrize("fresh", [False, True], ids=["decode", "fresh"])
@pytest.mark.parametrize("name", METHODS)
def test_attend(name: str, fresh: bool, sm: int, tmp_path: Path) -> None:
    method, dim = METHODS[name]
    record = method.record(LayerShape(8, dim, dim))
    fixed = {"records_ptr": "*i32", "params_ptr": "*fp16", "lengths_ptr": "*i32", "packed_ptr": "*i32", "counts_ptr": "*i32",
             "out_ptr": "*fp32", "lse_ptr": "*fp32", "scale_log2": "fp32"}  # fmt: skip
    types = pointers(attention.attend_kernel, "bf16" if fresh else "fp16", fixed)
    if not fresh:
        for absent in ("new_key_ptr", "new_value_ptr", "counts_ptr"):
            del types[absent]
    block_m = attention.block_rows(64 if fresh else 4)
    options = attention.launch(record, block_m)
    constants = quantize.record_constants(record) | {
        "NUM_HEADS": 8, "Q_PER_KV": 4, "SINK": method.sink_length, "RESIDUAL": method.residual_length,
        "BLOCK_M": block_m, "BLOCK_N": 32, "DOT": tl.float16, "NUM_STAGES": options["NUM_STAGES"],
    }  # fmt: skip
    used = resources(compiled(attention.attend_kernel, types, constants, sm, options["num_warps"]).asm["cubin"], tmp_path)
    assert used["STACK"] == 0, used


@pytest.mark.parametrize("sm", TARGETS)
def test_combine(sm: int, tmp_path: Path) -> None:
    types = {"partial_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16", "num_splits": "i32"}
    constants = {"VALUE_DIM": 128, "BLOCK_D": 128, "BLOCK_S": attention.MAX_SPLITS}
    used = resources(compiled(attention.combine_kernel, types, constants, sm, 4).asm["cubin"], tmp_path)
    assert used["STACK"] == 0, used
