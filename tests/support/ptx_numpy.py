"""PTX in NumPy: what the compiler made of a kernel, run without a GPU.

All threads of a program go in lock step, one array element each, so barriers do nothing and branches must be taken
alike.  Only the instructions that packing uses are there; any other raises.  Undefined registers hold odd bits.
"""

from __future__ import annotations

import re

import numpy as np

TYPES = {
    "f16": np.float16, "f32": np.float32, "s16": np.int16, "s32": np.int32, "s64": np.int64, "b16": np.uint16,
    "b8": np.uint8, "s8": np.int8, "u8": np.uint8,
    "u16": np.uint16, "b32": np.uint32, "u32": np.uint32, "b64": np.uint64, "u64": np.uint64,
}  # fmt: skip
RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
WIDE = {"s16": np.int32, "u16": np.uint32, "s32": np.int64, "u32": np.uint64}
NO_NAN = {"min": np.fmin, "max": np.fmax}
PLAIN = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative, "abs": np.abs,
    "sqrt": np.sqrt, "min": np.minimum, "max": np.maximum,
}  # fmt: skip
ORDER = {
    "lt": np.less, "gt": np.greater, "le": np.less_equal, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "lo": np.less, "hi": np.greater, "ls": np.less_equal, "hs": np.greater_equal,
}  # fmt: skip


def parse(ptx: str) -> tuple[list[str], dict[str, int]]:
    """Instructions and, by label, the index of the one that follows it."""
    program: list[str] = []
    labels: dict[str, int] = {}
    body = re.sub(r"//.*", "", ptx[ptx.index("{", ptx.index(".reqntid")) + 1 :])
    for text in re.split(r"[;\n]", body.replace("\t", " ")):
        text = text.strip()
        while label := re.match(r"(\$?[A-Za-z_]\w*):\s*", text):
            labels[label[1]] = len(program)
            text = text[label.end() :]
        if text and text not in "{}" and not text.startswith("."):
            program.append(text)
    return program, labels


def inline(asm: str, operands: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a piece of inline PTX leaves in registers that hold ``operands`` (bits, a number a thread) before."""
    program = object.__new__(Program)
    program.registers = {name: value.astype(np.uint64) for name, value in operands.items()}
    program.lane = np.arange(len(next(iter(operands.values()))))
    program.active = np.ones(program.lane.shape, bool)
    asm = re.sub(r"\.reg [^;]*;", "", asm).strip()
    for line in (asm[1:-1] if asm.startswith("{") else asm).split(";"):
        op, _, rest = line.strip().partition(" ")
        if op:
            program.step(op.split("."), split(rest))
    return program.registers


def split(rest: str) -> list[str]:
    """The operands of an instruction."""
    return [x.strip() for x in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", rest) if x.strip()]


def listed(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{} ").split(",")]


def compared(how: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    nan = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(a.shape, bool)
    if how in ("nan", "num"):
        return nan if how == "nan" else ~nan
    if how in ORDER:
        return ORDER[how](a, b) & ~nan
    return ORDER[how.removesuffix("u")](a, b) | nan


BLOCK = ("%ctaid.x", "%ctaid.y", "%ctaid.z")


class Program:
    """One program (thread block) of a kernel: ``run`` changes ``memory``, the bytes that its pointers index."""

    def __init__(self, ptx: str, memory: np.ndarray, params: list[int], block: tuple[int, int, int]) -> None:
        self.program, self.labels = parse(ptx)
        self.memory, self.params = memory, params
        self.shared = np.zeros(1 << 17, np.uint8)
        warps = re.search(r"\.reqntid (\d+)", ptx)
        assert warps
        self.lane = np.arange(int(warps[1]))
        self.registers: dict[str, np.ndarray] = {}
        for name, value in (("%tid.x", self.lane), *zip(BLOCK, block, strict=True), ("global_smem", 0)):
            self.registers[name] = self.spread(value)

    def spread(self, value: object) -> np.ndarray:
        return np.broadcast_to(np.asarray(value, np.uint64), self.lane.shape)

    def get(self, name: str, kind: str) -> np.ndarray:
        if name in self.registers:
            raw = self.registers[name]
        elif name.startswith("%"):
            raw = self.spread(0x7FC17E01DEAD7E03)
        else:
            number = int(name[2:], 16) if name.startswith("0f") else int(name.rstrip("U"), 0)
            raw = self.spread(number & 2**64 - 1)
        return raw.astype(RAW[np.dtype(TYPES[kind]).itemsize]).view(TYPES[kind])

    def truth(self, name: str) -> np.ndarray:
        value = self.registers[name.strip("!")] if "%" in name else self.spread(int(name) != 0)
        return value.astype(bool) ^ name.startswith("!")

    def put(self, name: str, value: np.ndarray) -> None:
        if value.dtype != bool:
            value = np.ascontiguousarray(value).view(RAW[value.dtype.itemsize])
        self.registers[name] = np.where(self.active, value.astype(np.uint64), self.registers.get(name, self.spread(0)))

    def pairs(self, name: str) -> np.ndarray:
        return self.get(name, "b32").view(np.float16).reshape(-1, 2)

    def address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip(" []").partition("+")
        return self.get(base.strip(), "b64").astype(np.int64) + int(offset or 0)

    def run(self) -> None:
        at = 0
        with np.errstate(all="ignore"):
            while self.program[at] != "ret":
                text, at = self.program[at], at + 1
                self.active = np.ones(self.lane.shape, bool)
                if guard := re.match(r"@(!?%p\d+)\s+", text):
                    self.active, text = self.truth(guard[1]), text[guard.end() :]
                op, _, rest = text.partition(" ")
                if op.startswith("bra"):
                    assert self.active.all() or not self.active.any(), f"threads part at {text}"
                    at = self.labels[rest.strip()] if self.active.all() else at
                elif not op.startswith("bar."):
                    self.step(op.split("."), split(rest))

    def step(self, op: list[str], x: list[str]) -> None:
        kind = op[-1]
        if op[:2] == ["ld", "param"]:
            number = int(x[1].strip("[] ").rsplit("_", 1)[1])
            self.put(x[0], self.spread(self.params[number] & 2**64 - 1).astype(TYPES[kind]))
        elif op[0] in ("ld", "st"):
            self.access(op[0] == "ld", self.shared if "shared" in op else self.memory, kind, x)
        elif op[0] in ("ldmatrix", "stmatrix"):
            self.matrices(op[0] == "ldmatrix", "trans" in op, x)
        elif op[0] == "mov":
            self.move(kind, x)
        elif op[0] == "shfl":
            lane = self.get(x[2], "u32").astype(int)
            source = {"bfly": self.lane ^ lane, "idx": self.lane // 32 * 32 + lane % 32}[op[2]]
            self.put(x[0], self.get(x[1], "b32")[source])
        elif op[0] == "setp" and kind == "f16x2":
            both = compared(op[1], self.pairs(x[1]), self.pairs(x[2]))
            for i, name in enumerate(x[0].split("|")):
                self.put(name.strip(), both[:, i])
        elif op[0] == "setp":
            out = compared(op[1], self.get(x[1], kind), self.get(x[2], kind))
            self.put(x[0], PLAIN[op[2]](out, self.truth(x[3])) if len(x) > 3 else out)
        elif kind == "pred":
            self.put(x[0], PLAIN[op[0]](*(self.truth(name) for name in x[1:])))
        elif kind == "f16x2":
            table = PLAIN if "NaN" in op else NO_NAN
            self.put(x[0], table[op[0]](self.pairs(x[1]), self.pairs(x[2])).view(np.uint32)[:, 0])
        elif op[0] == "set":
            self.put(x[0], compared(op[1], self.get(x[1], kind), self.get(x[2], kind)).astype(TYPES[op[2]]))
        elif op[0] == "fma" and "sat" in op:
            a, b, c = (self.get(name, kind).astype(np.longdouble) for name in x[1:])
            self.put(x[0], np.nan_to_num(np.clip(a * b + c, 0, 1), nan=0).astype(TYPES[kind]))
        elif op[0] == "dp4a":
            a, b = (self.get(name, "b32").view(np.uint8).reshape(-1, 4).astype(np.uint32) for name in x[1:3])
            self.put(x[0], (a * b).sum(1, dtype=np.uint32) + self.get(x[3], "u32"))
        elif op[0] == "movmatrix":
            rows = self.get(x[1], "b32").view(np.uint16).reshape(-1, 8, 8)
            self.put(x[0], np.ascontiguousarray(rows.swapaxes(1, 2)).view(np.uint32).reshape(-1))
        elif op[0] == "mma":
            self.product(op, x)
        elif op[0] == "selp":
            self.put(x[0], np.where(self.truth(x[3]), self.get(x[1], kind), self.get(x[2], kind)))
        elif op[0] == "cvt":
            self.convert(op, x)
        else:
            self.put(x[0], self.computed(op, kind, x))

    def access(self, load: bool, space: np.ndarray, kind: str, x: list[str]) -> None:
        names, at = (listed(x[0]), self.address(x[1])) if load else (listed(x[1]), self.address(x[0]))
        size = np.dtype(TYPES[kind]).itemsize
        at = at[self.active]
        assert not len(at) or (at.min() >= 0 and at.max() + size * len(names) <= len(space)), f"outside: {x}"
        assert not (at % (size * len(names))).any(), f"misaligned: {x}"
        for i, name in enumerate(names):
            cells = (at + i * size)[:, None] + np.arange(size)
            if load:
                value = np.zeros((len(self.lane), size), np.uint8)
                value[self.active] = space[cells]
                self.put(name, value.view(RAW[size])[:, 0])
            else:
                space[cells] = self.get(name, kind).view(np.uint8).reshape(-1, size)[self.active]

    def matrices(self, load: bool, transposed: bool, x: list[str]) -> None:
        """8 x 8 halves: row ``r`` of matrix ``i`` lies where lane ``8 i + r`` says, a lane holds two neighbours."""
        names, at = (listed(x[0]), self.address(x[1])) if load else (listed(x[1]), self.address(x[0]))
        row, column = (self.lane % 32 // 4)[:, None], (self.lane % 4 * 2)[:, None] + np.arange(2)
        if transposed:
            row, column = column, row
        for i, name in enumerate(names):
            cells = (at[self.lane[:, None] // 32 * 32 + 8 * i + row] + 2 * column)[:, :, None] + np.arange(2)
            if load:
                self.put(name, self.shared[cells].reshape(-1, 4).view(np.uint32)[:, 0])
            else:
                self.shared[cells.reshape(-1, 4)] = self.get(name, "b32").view(np.uint8).reshape(-1, 4)

    def product(self, op: list[str], x: list[str]) -> None:
        """``mma.m16n8k32`` of bytes: a register is four of a row (of a column of ``b``), lanes ``4 r + c``."""
        assert op[3] == "m16n8k32", op

        def registers(operand: str, kind: str) -> np.ndarray:
            held = [self.get(name, "b32").view(TYPES[kind]).reshape(len(self.lane), -1) for name in listed(operand)]
            return np.stack(held, 1).reshape(-1, 8, 4, len(held), held[0].shape[1]).astype(np.int64)

        rows = registers(x[1], op[-3]).reshape(-1, 8, 4, 2, 2, 4)  # (r, c, upper half of k, rows 8 .., byte)
        rows = rows.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 32)
        columns = registers(x[2], op[-2]).transpose(0, 3, 2, 4, 1).reshape(-1, 32, 8)
        sums = registers(x[3], op[-1])[..., 0].reshape(-1, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8)
        sums = (sums + rows @ columns).astype(np.int32).reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4)
        for name, value in zip(listed(x[0]), sums.reshape(-1, 4).T, strict=True):
            self.put(name, value)

    def move(self, kind: str, x: list[str]) -> None:
        if kind == "pred":
            self.put(x[0], self.truth(x[1]))
        elif x[0].startswith("{"):
            for i, name in enumerate(listed(x[0])):
                self.put(name, self.get(x[1], kind).view(np.uint16).reshape(len(self.lane), -1)[:, i])
        elif x[1].startswith("{"):
            self.put(x[0], np.stack([self.get(name, "b16") for name in listed(x[1])], 1).view(TYPES[kind])[:, 0])
        else:
            self.put(x[0], self.get(x[1], kind))

    def convert(self, op: list[str], x: list[str]) -> None:
        to, of = op[-2:]
        if to == "f16x2":
            high, low = (self.get(name, of).astype(np.float16) for name in x[1:])
            self.put(x[0], np.stack([low, high], 1).view(np.uint32)[:, 0])
        else:
            self.put(x[0], self.get(x[1], of).astype(TYPES[to]))

    def computed(self, op: list[str], kind: str, x: list[str]) -> np.ndarray:
        if op[0] == "prmt":
            cells = np.concatenate([self.get(name, "b32").view(np.uint8).reshape(-1, 4) for name in x[1:3]], 1)
            select = self.get(x[3], "u32").astype(int)
            bytes_ = [cells[self.lane, select >> 4 * i & 7] for i in range(4)]
            signs = [np.where(byte > 127, 255, 0).astype(np.uint8) for byte in bytes_]
            chosen = [np.where(select >> 4 * i & 8, signs[i], bytes_[i]) for i in range(4)]
            return np.stack(chosen, 1).view(np.uint32)[:, 0]
        if op[0] == "popc":
            return np.bitwise_count(self.get(x[1], kind).view(RAW[np.dtype(TYPES[kind]).itemsize])).astype(np.uint32)
        if op[0] == "redux":
            assert (self.get(x[2], "u32") == 2**32 - 1).all()
            value = self.get(x[1], kind).reshape(-1, 32)
            return np.repeat(PLAIN[op[2]].reduce(value, 1), 32)
        if op[0] == "bfe":
            word, low, size = (self.get(name, "u32").astype(np.int64) for name in x[1:])
            field = word >> low & (1 << size) - 1
            return (field - (field >> size - 1 << size if kind == "s32" else 0)).astype(np.int32)
        if op[0] in ("shl", "shr"):
            value, places = self.get(x[1], kind), self.get(x[2], "u32")
            assert (places < 8 * value.itemsize).all()
            return value << places.astype(value.dtype) if op[0] == "shl" else value >> places.astype(value.dtype)
        if op[0] in ("mul", "mad") and op[1] in ("wide", "hi"):
            product = self.get(x[1], kind).astype(WIDE[kind]) * self.get(x[2], kind).astype(WIDE[kind])
            if op[1] == "hi":
                return (product >> WIDE[kind](32)).astype(TYPES[kind])
            return (
                product if op[0] == "mul" else product + self.get(x[3], f"b{8 * product.itemsize}").view(product.dtype)
            )
        if op[:2] == ["add", "rm"]:
            a, b = (self.get(name, kind) for name in x[1:])
            total, exact = a + b, a.astype(np.longdouble) + b.astype(np.longdouble)
            return np.where(total > exact, np.nextafter(total, TYPES[kind](-np.inf)), total)
        if not set(op[1:-1]) <= {"rn", "lo", "NaN", "full"}:
            raise NotImplementedError(".".join(op))
        values = [self.get(name, kind) for name in x[1:]]
        if op[0] == "fma":
            a, b, c = (value.astype(np.longdouble) for value in values)
            return (a * b + c).astype(TYPES[kind])
        if op[0] == "div" and kind[0] in "su":
            assert all((value >= 0).all() for value in values), "of negative numbers NumPy rounds the other way"
            return values[0] // np.maximum(values[1], 1)  # what is divided by nothing is not used
        if op[0] == "mad":
            return values[0] * values[1] + values[2]
        table = NO_NAN if op[0] in NO_NAN and kind.startswith("f") and "NaN" not in op else PLAIN
        return table[op[0]](*values)
