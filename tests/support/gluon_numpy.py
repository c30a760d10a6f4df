"""Run a Gluon kernel file in NumPy: what its programs compute, without a GPU (Triton's interpreter takes no Gluon).

Values are arrays, layouts are nothing (that a layout conversion moves no data is asserted when the kernel is compiled),
asynchronous copies happen at once, inline PTX is the few instructions of ``ASM``.  New shared memory is poisoned.
Barriers count bytes and phases, and a wait that would never end is an error; warp-group products happen only when they
are waited for, so a tile that is overwritten before its product is done spoils the result.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import ptx_numpy
import torch

ids = (0, 0, 0)


class Value:
    """A block of values (0-d: a scalar) with the operations that kernels use."""

    def __init__(self, array):
        self.a = np.asarray(array)

    shape = property(lambda self: list(self.a.shape))
    dtype = property(lambda self: self.a.dtype)
    type = property(lambda self: SimpleNamespace(layout=None))

    def to(self, dtype, bitcast=False):
        if bitcast:
            return Value(self.a.view(dtype))
        with np.errstate(over="ignore"):
            return Value(self.a.astype(dtype))

    def reshape(self, shape):
        return Value(self.a.reshape(shape))

    def permute(self, order):
        return Value(self.a.transpose(order))

    def __getitem__(self, index):
        return Value(self.a[index])

    def __bool__(self):
        return bool(self.a)

    def __index__(self):
        return int(self.a)


def raw(x):
    """NumPy's, or a number of Python's own, which takes the type of what it meets."""
    return x.a if isinstance(x, Value) else x.value if isinstance(x, Integer | Real) else x


def operator(name):
    def apply(self, other):
        if isinstance(other, Pointer):
            return NotImplemented
        with np.errstate(all="ignore"):
            return Value(getattr(self.a, name)(raw(other)))

    return apply


BOTH = ("add", "sub", "mul", "truediv", "floordiv", "and", "or")
for symbol in (*BOTH, "mod", "xor", "lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{symbol}__", operator(f"__{symbol}__"))
for symbol in BOTH:
    setattr(Value, f"__r{symbol}__", operator(f"__r{symbol}__"))
Value.__neg__ = lambda self: Value(-self.a)
Value.__hash__ = None


class Pointer:
    def __init__(self, memory, at=0):
        self.memory, self.at = memory, at  # memory: a flat array

    dtype = property(lambda self: SimpleNamespace(element_ty=self.memory.dtype))

    def __add__(self, offset):
        return Pointer(self.memory, self.at + np.asarray(raw(offset), np.int64))

    __radd__ = __add__

    def to(self, dtype, bitcast):
        at = np.asarray(self.at) * self.memory.itemsize
        assert not (at % np.dtype(dtype).itemsize).any(), "a pointer that is not aligned"
        whole = self.memory[
            : self.memory.nbytes // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize // self.memory.itemsize
        ]
        return Pointer(whole.view(dtype), at // np.dtype(dtype).itemsize)


class Shared:
    def __init__(self, array):
        self.a = array

    shape = property(lambda self: list(self.a.shape))

    def index(self, i):
        return Shared(self.a[int(raw(i))])

    def slice(self, start, size):
        assert start + size <= self.a.shape[0]
        return Shared(self.a[start : start + size])

    def reshape(self, shape):
        return Shared(self.a.reshape(shape))

    def permute(self, order):
        return Shared(self.a.transpose(order))

    def reinterpret(self, dtype, shape, layout):
        return Shared(self.a.view(dtype).reshape(shape))

    _reinterpret = reinterpret

    def load(self, layout):
        return Value(self.a.copy())

    def store(self, value):
        self.a[...] = value.a


class Layout:
    def __init__(self, *_, **__):
        self.value = self


class Integer(int):
    value = property(int)


class Real(float):
    value = property(float)


def constexpr(x):
    return Integer(x) if isinstance(x, int) else Real(x) if isinstance(x, float) else x


def load(pointer, mask=True, other=0, cache_modifier=""):
    at, mask = np.broadcast_arrays(pointer.at, raw(mask))
    assert ((at >= 0) & (at < pointer.memory.size))[mask].all(), "a load outside its tensor"
    out = np.full(at.shape, raw(other), pointer.memory.dtype)
    out[mask] = pointer.memory[at[mask]]
    return Value(out)


def store(pointer, value, mask=True):
    at, mask, value = np.broadcast_arrays(pointer.at, raw(mask), raw(value))
    assert ((at >= 0) & (at < pointer.memory.size))[mask].all(), "a store outside its tensor"
    pointer.memory[at[mask]] = value[mask]


def atomic_add(pointer, value, sem, scope):
    before = load(pointer)
    store(pointer, before + value)
    return before


def drawn(pointer, wanted):
    before = load(pointer, wanted.a != 0)
    store(pointer, before + 1, wanted.a != 0)
    return before


def copy_async(shared, pointer, mask=True, cache_modifier=""):
    shared.a[...] = np.broadcast_to(load(pointer, mask).a, shared.a.shape)  # zeros where nothing is copied


def mma_v2(a, b, acc):
    assert a.dtype == b.dtype == np.float16
    with np.errstate(all="ignore"):
        return Value((np.matmul(a.a.astype(np.float64), b.a.astype(np.float64)) + acc.a).astype(np.float32))


class Descriptor:
    """A matrix as the copy engine sees it: tiles of ``block``, zeros outside."""

    layout = None

    def __init__(self, tensor, block, layout) -> None:
        self.a, self.block, self.dtype = tensor.numpy(), tuple(block), tensor.numpy().dtype

    def tile(self, coordinates):
        out = np.zeros(self.block, self.a.dtype)
        starts = [int(raw(at)) for at in coordinates]
        inside = self.a[tuple(slice(at, at + size) for at, size in zip(starts, self.block, strict=True))]
        out[tuple(map(slice, inside.shape))] = inside
        return out


class Barriers:
    """Memory barriers by their place in shared memory: complete phases, bytes that are due, whether someone arrived."""

    def __init__(self) -> None:
        self.states: dict[int, list[int]] = {}

    def state(self, bar):
        return self.states[bar.a.__array_interface__["data"][0]]

    def init(self, bar, count):
        assert count == 1
        self.states[bar.a.__array_interface__["data"][0]] = [0, 0, 0]

    def changed(self, state):
        if state[2] and not state[1]:
            state[:] = [state[0] + 1, 0, 0]

    def expect(self, bar, nbytes, pred=True):
        state = self.state(bar)
        if pred:
            assert not state[2], "a barrier that someone has arrived at"
            state[1:] = [state[1] + nbytes, 1]
            self.changed(state)

    def load(self, descriptor, coordinates, bar, tile, pred=True):
        if pred:
            state = self.state(bar)
            tile.a[...] = descriptor.tile(coordinates)
            state[1] -= tile.a.nbytes
            self.changed(state)

    def wait(self, bar, parity):
        assert self.state(bar)[0] % 2 != parity, "a wait that never ends"

    def invalidate(self, bar):
        assert self.state(bar)[1:] == [0, 0], "copies under way into memory that is given back"


class Accumulator(Value):
    """The sum of warp-group products, of which some may be to come."""


class WarpGroup:
    def __init__(self) -> None:
        self.products: list[tuple[Shared, Shared, Accumulator]] = []

    def warpgroup_mma(self, a, b, acc, is_async):
        assert is_async
        assert a.a.dtype == b.a.dtype == np.float16
        acc = acc if isinstance(acc, Accumulator) else Accumulator(acc.a)
        self.products.append((a, b, acc))
        return acc

    def warpgroup_mma_wait(self, num_outstanding, deps):
        while len(self.products) > num_outstanding:
            a, b, acc = self.products.pop(0)
            acc.a = (acc.a + a.a.astype(np.float64) @ b.a.astype(np.float64)).astype(np.float32)
        return deps[0] if len(deps) == 1 else tuple(deps)


def swap(x):
    return x[..., np.arange(8) ^ 4]


def rest(a, b, part):
    a, b, part = (x.astype(np.float64) for x in (a, b, part))
    h = (a * b).astype(np.float16) * part
    return (a * b + h.astype(np.float16)).astype(np.float16)


def transpose_blocks(x):
    return x.reshape(-1, 8, 8).swapaxes(1, 2).reshape(x.shape)


def unpack(word, outputs):
    nbits, word = 32 // outputs, word.view(np.uint32)
    step, halves = 8 // nbits, []
    for field in range(16 // nbits):
        source = word if field < step else word >> 8
        pair = source & np.uint32((2**nbits - 1) * 0x00010001 << nbits * (field % step))
        halves += [(pair & 0xFFFF).astype(np.uint16).view(np.float16), (pair >> 16).astype(np.uint16).view(np.float16)]
    return tuple(Value(half) for half in halves)


ASM = {"shfl.sync.bfly": swap, "mul.rn.f16x2": rest, "movmatrix": transpose_blocks}


def lanes_last(array):
    """The axes of 8 and 4 that are a warp's lanes moved to the end, and how to move them back; as it is without."""
    axis = next((i for i in range(array.ndim - 1) if array.shape[i : i + 2] == (8, 4)), array.ndim - 2)
    return np.moveaxis(array, (axis, axis + 1), (-2, -1)), lambda x: np.moveaxis(x, (-2, -1), (axis, axis + 1))


def by_ptx(asm, args, dtypes, pack):
    """Any inline PTX, run by ``ptx_numpy.py``: registers of two elements hold neighbours along the last axis."""
    arrays = [lanes_last(x.a)[0] if pack == 1 else x.a for x in args]
    back = lanes_last(args[0].a)[1] if pack == 1 else lambda x: x
    shape, number = arrays[0].shape, 0
    held, outs = {}, []
    for dtype in dtypes:
        outs.append([f"${number + i}" for i in range(pack * np.dtype(dtype).itemsize // 4 or 1)])
        number += len(outs[-1])
    for array in arrays:
        raw = np.ascontiguousarray(array).view(np.uint32).reshape(-1, pack * array.itemsize // 4 or 1)
        for i in range(raw.shape[1]):
            held[f"${number}"], number = raw[:, i], number + 1
    left = ptx_numpy.inline(asm, held)
    found = []
    for names, dtype in zip(outs, dtypes, strict=True):
        raw = np.stack([left[name].astype(np.uint32) for name in names], 1)
        found.append(Value(np.ascontiguousarray(back(raw.view(dtype).reshape(shape)))))
    return found


def inline_asm_elementwise(asm, constraints, args, dtype, is_pure, pack):
    if "prefetch" in asm:
        load(args[0])  # it must lie within the tensor
        return None
    if "atom." in asm:
        return drawn(*args)
    if "fence" in asm:
        return args[0]
    if isinstance(dtype, tuple):
        if re.search(r"and\.b32 .* mov\.b32 \{", asm):
            return unpack(args[0].a, len(dtype))
        return tuple(by_ptx(asm, args, dtype, pack))
    known = next((run for name, run in ASM.items() if name in asm), None)
    if known is None or (args[0].dtype != np.float16 and args[0].shape[-1] != 8):
        return by_ptx(asm, args, (dtype,), pack)[0]
    return Value(known(*(x.a for x in args)).astype(dtype))


def unary(function):
    def apply(x):
        with np.errstate(all="ignore"):
            return Value(function(x.a).astype(x.dtype))

    return apply


def binary(function):
    return lambda a, b: Value(function(raw(a), raw(b)))


def fma(a, b, c):
    return Value((a.a.astype(np.float64) * b.a + c.a).astype(np.float32))


def broadcast(*values):
    return tuple(Value(x.copy()) for x in np.broadcast_arrays(*(x.a for x in values)))


def allocate(dtype, shape, layout):
    return Shared(np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype).reshape(shape))


def where(condition, a, b):
    if not isinstance(a, Value) and not isinstance(b, Value):
        kind = np.float32 if isinstance(a, float) or isinstance(b, float) else np.int32
        a = Value(np.asarray(a, kind))
    kind = (a if isinstance(a, Value) else b).dtype
    return Value(np.where(raw(condition), raw(a), raw(b)).astype(kind))


GL = SimpleNamespace(
    float16=np.float16, float32=np.float32, int16=np.int16, int32=np.int32, int64=np.int64,
    pointer_type=lambda dtype: dtype,
    constexpr=constexpr, shared_memory_descriptor=Shared, program_id=lambda axis: Value(np.int32(ids[axis])),
    arange=lambda start, end, layout=None: Value(np.arange(start, end, dtype=np.int32)),
    zeros=lambda shape, dtype, layout=None: Value(np.zeros(shape, dtype)),
    full=lambda shape, value, dtype, layout=None: Value(np.full(shape, value, dtype)),
    load=load, store=store, atomic_add=atomic_add, barrier=lambda: None,
    join=lambda a, b: Value(np.stack([a.a, b.a], -1)), split=lambda x: (Value(x.a[..., 0]), Value(x.a[..., 1])),
    broadcast=broadcast, where=where,
    convert_layout=lambda x, layout, assert_trivial=False: x, static_range=range, static_assert=lambda _: None,
    maximum=binary(np.fmax), minimum=binary(np.fmin), abs=unary(np.abs), exp=unary(np.exp),
    exp2=unary(np.exp2), log2=unary(np.log2),
    max=lambda x, axis=None: Value(np.fmax.reduce(x.a, axis)), fma=fma,
    sum=lambda x, axis=None: Value(np.sum(x.a, axis, dtype=x.dtype)),
    associative_scan=lambda x, axis, function: Value(np.cumsum(x.a, axis, dtype=x.dtype)),
    inline_asm_elementwise=inline_asm_elementwise, allocate_shared_memory=allocate,
    BlockedLayout=Layout, SliceLayout=Layout, DotOperandLayout=Layout, NVMMADistributedLayout=Layout,
    SwizzledSharedLayout=Layout, DistributedLinearLayout=Layout,
    NVMMASharedLayout=SimpleNamespace(get_default_for=lambda shape, dtype: Layout()),
)  # fmt: skip


class Jit:
    """A kernel or a function of one: called inside a kernel, launched with ``[grid]``."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __getitem__(self, grid):
        def launch(*args, **options):
            global ids
            constants = {name: value for name, value in options.items() if name.isupper()}
            values = [as_argument(x) for x in args]
            for point in itertools.product(*map(range, grid)):
                ids = (*point, 0, 0)
                self.function(*values, **constants)

        return launch


def as_argument(x):
    if isinstance(x, torch.Tensor):
        assert x.untyped_storage().nbytes() >= x.nbytes
        whole = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
        return Pointer(whole.numpy(), x.storage_offset())
    return Value(np.float32(x)) if isinstance(x, float) else Value(np.int32(x)) if isinstance(x, int) else x


def jit(function=None, **_):
    return Jit(function) if function else Jit


def run_file(path, **others: object) -> dict[str, object]:
    """The names of a kernel file whose kernels run here, with ``others`` for what it imports from kernel files."""
    barriers = Barriers()
    sys.modules.setdefault("kernels_in_numpy", ModuleType("kernels_in_numpy"))  # dataclasses look for it
    text = re.sub(r"^(import triton|from triton).*\n", "", path.read_text(), flags=re.MULTILINE)
    names = {
        "__name__": "kernels_in_numpy", "gl": GL, "tl": GL,
        "gluon": SimpleNamespace(jit=jit, constexpr_function=lambda function: function),
        "triton": SimpleNamespace(jit=jit, next_power_of_2=lambda n: 1 << (n - 1).bit_length()), "mma_v2": mma_v2,
        "async_copy": SimpleNamespace(async_load=copy_async, commit_group=lambda: None, wait_group=lambda n: None),
        "gdc_wait": lambda: None, "gdc_launch_dependents": lambda: None,
        "TensorDescriptor": SimpleNamespace(from_tensor=Descriptor),
        "tma": SimpleNamespace(async_load=barriers.load), "mbarrier": barriers, "hopper": WarpGroup(),
    }  # fmt: skip
    barriers.MBarrierLayout = Layout
    exec(compile(text, str(path), "exec"), names)
    names.update(others)
    return names


def run_modules(modules, **replaced: dict[str, object]) -> dict[str, object]:
    """The names of the last of kernel files that take kernels from those before them, which run here too; ``replaced``:
    by a module's last name, what it and those behind it have in the place of its own."""
    made: dict[int, object] = {}
    for module in modules:
        names = run_file(Path(module.__file__))
        names |= {name: made[id(value)] for name, value in names.items() if id(value) in made}
        names |= replaced.get(module.__name__.rpartition(".")[2], {})
        made |= {id(value): names[name] for name, value in vars(module).items() if callable(value) and name in names}
    return names
