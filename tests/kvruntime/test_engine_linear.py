"""The engine's kernels against plain PyTorch: on a CUDA device there, elsewhere in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")

import gluon_numpy  # noqa: E402

from kvruntime.engine import hopper, linear, norm, product, reference  # noqa: E402
from kvruntime.engine.reference import Norm  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
DTYPES = ["float16", "float32"] + (["bfloat16"] if DEVICE == "cuda" else [])  # the interpreter has no bfloat16
NORMS = [None, "layer", "rms"]


class Random:
    """Seeded tensors of one dtype, on the device that judges: for float16 the CPU, unless a weight is ``large``.

    The sanitizer runs the float16 points without the large ones: on an H100 its racecheck (2025.3.1) aborts where
    PyTorch multiplies, as it seems (validation/experiments), though it is told to watch ours only."""

    def __init__(self, seed: int, dtype: str, large: bool = False) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), getattr(torch, dtype)
        self.device = "cpu" if dtype == "float16" and not large else DEVICE

    def __call__(self, *size: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*size, generator=self.generator)).to(self.dtype).to(self.device)

    def norm(self, kind: str | None, k: int) -> Norm | None:
        return None if kind is None else Norm(1 + self(k, scale=0.2), self(k) if kind == "layer" else None, 1e-5)


def there(value, device: str = DEVICE):
    """Tensors, also those of a norm, on ``device``."""
    if isinstance(value, Norm):
        return Norm(there(value.weight, device), there(value.bias, device), value.eps)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def on_device(run, *given, **options):
    """What ``run`` makes of copies on the device, back where the first argument lies."""
    out = run(*map(there, given), **{name: there(value) for name, value in options.items()})
    back = given[0].device
    return tuple(there(x, back) for x in out) if isinstance(out, tuple) else there(out, back)


def is_large(width: int, k: int) -> bool:
    """A weight whose product takes a CPU long."""
    return width * k > 1 << 24


def hold(got: torch.Tensor, wanted: torch.Tensor, truth: torch.Tensor) -> None:
    """``got`` errs at most twice as much as PyTorch in the same dtype, against the same in float64."""
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert torch.isfinite(got).all()
    size = truth.norm()
    allowed = (wanted.double() - truth).norm() / size
    assert (got.double() - truth).norm() / size <= 2 * allowed + (1e-6 if got.dtype == torch.float32 else 1e-4)


def double(value):
    """A tensor, a norm or None in float64."""
    if isinstance(value, Norm):
        return Norm(double(value.weight), double(value.bias), value.eps)
    return value.double() if isinstance(value, torch.Tensor) else value


def run_linear(rows: int, width: int, k: int, kind: str | None, activation: str | None, dtype: str, bias: bool) -> None:
    """One product as a model has it: a residual where there is no activation."""
    random = Random(rows * width + k, dtype, is_large(width, k))
    factor = 2 if activation == "silu" else 1
    x, weight = random(rows, k, scale=2), random(factor * width, k, scale=k**-0.5)
    options = {
        "bias": random(factor * width) if bias else None,
        "norm": random.norm(kind, k),
        "activation": activation,
        "residual": random(rows, width) if activation is None else None,
    }
    got = on_device(linear.linear, x, weight, **options)
    wanted = reference.linear(x, weight, **options)
    exact = {name: double(value) for name, value in options.items()}
    hold(got, wanted, exact_linear(x.double(), weight.double(), **exact))


def exact_linear(x, weight, bias, norm, activation, residual):
    """Float64 from end to end, without a line of the reference."""
    if norm is not None:
        centred = x if norm.bias is None else x - x.mean(1, keepdim=True)
        x = centred / (centred.square().mean(1, keepdim=True) + norm.eps).sqrt() * norm.weight
        x = x if norm.bias is None else x + norm.bias
    out = x @ weight.T
    out = out if bias is None else out + bias
    if activation == "gelu":
        out = 0.5 * out * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (out + 0.044715 * out**3)))
    elif activation == "silu":
        gate, factor = out.chunk(2, 1)
        out = gate * torch.sigmoid(gate) * factor
    return out if residual is None else residual + out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(
    ("rows", "width", "k", "bias"),
    [
        (1, 37, 768, True),
        (2, 64, 1280, False),
        (3, 5, 256, True),
        (4, 17, 96, False),
        (1, 41, 5120, True),  # longer than a program takes at once
        (3, 22, 6000, True),
        (1, 3, 100, False),  # rows of W that are not 16-byte aligned
    ],
)
def test_linear(rows, width, k, bias, kind, activation, dtype) -> None:
    run_linear(rows, width, k, kind, activation, dtype, bias)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("rows", [1, 3])
def test_linear_takes_tile_after_tile(rows: int, activation: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than programs, the last of them half empty."""
    monkeypatch.setattr(linear, "multiprocessors", lambda device: 1)
    width = 103
    plan = linear.plan(width, 256, 4 if rows == 3 else 1, activation == "silu", 2, 1)
    assert plan.num_programs < plan.num_tiles
    assert width % plan.block_n
    run_linear(rows, width, 256, "layer", activation, "float16", True)


@pytest.mark.skipif(DEVICE == "cpu", reason="too many programs for the interpreter")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize(
    ("width", "k", "kind", "activation"),
    [
        (2304, 768, "layer", None),
        (3072, 768, "layer", "gelu"),
        (768, 3072, None, None),
        (50257, 768, "layer", None),
        (3840, 1280, "layer", None),
        (1280, 5120, None, None),
        (6144, 4096, "rms", None),
        (14336, 4096, "rms", "silu"),
        (4096, 14336, None, None),
        (13824, 5120, "rms", "silu"),
    ],
)
def test_linear_at_the_models_sizes(width, k, kind, activation, rows, dtype) -> None:
    run_linear(rows, width, k, kind, activation, dtype, kind != "rms")


SIZES = [
    (1, 130, 96),
    (5, 37, 768),
    (8, 64, 640),
    (16, 130, 96),
    (33, 70, 200),
    (64, 64, 256),
    (100, 40, 256),
    (3, 20, 2000),  # more tiles than are under way at once
    (70, 40, 2000),
]
if DEVICE == "cuda":
    SIZES += [(m, n, k) for m in (8, 64, 128) for n, k in ((2304, 768), (768, 3072), (50257, 768), (4096, 14336))]


def hopper_in_numpy() -> dict[str, object]:
    """What ``hopper.py`` defines, its kernel run by ``gluon_numpy.py``."""
    return gluon_numpy.run_file(Path(hopper.__file__), activate=gluon_numpy.run_file(Path(linear.__file__))["activate"])


KERNELS = [("any", dtype) for dtype in DTYPES]
if DEVICE == "cpu" or ON_HOPPER:
    KERNELS += [("hopper", dtype) for dtype in DTYPES if dtype != "float32"]


@pytest.fixture(params=KERNELS, ids="-".join)
def dtype_of_product(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """The type for ``product`` by its own kernel, and by Hopper's, which runs in NumPy without a device."""
    name, dtype = request.param
    if name == "any":
        monkeypatch.setattr(hopper, "supports", lambda x, weight: False)
    elif DEVICE == "cpu":
        monkeypatch.setattr(hopper, "supports", lambda x, weight: True)
        monkeypatch.setattr(hopper, "launch", hopper_in_numpy()["launch"])
    return dtype


@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
@pytest.mark.parametrize(("rows", "width", "k"), SIZES)
def test_product(dtype_of_product, rows, width, k, activation) -> None:
    random = Random(rows, dtype_of_product, is_large(width, k))
    factor = 2 if activation == "silu" else 1
    x, weight = random(rows, k), random(factor * width, k, scale=k**-0.5)
    bias = random(factor * width) if rows % 3 else None
    got = on_device(product.product, x, weight, bias, activation)
    wanted = reference.linear(x, weight, bias, activation=activation)
    hold(got, wanted, exact_linear(x.double(), weight.double(), double(bias), None, activation, None))


@pytest.mark.parametrize("kind", NORMS[1:])
@pytest.mark.parametrize(("rows", "width", "k"), [size for size in SIZES if size[1] <= 4096])  # no model adds logits
def test_parts_and_add_norm(dtype_of_product, rows, width, k, kind) -> None:
    random = Random(rows, dtype_of_product, is_large(width, k))
    x, weight, hidden, bias = random(rows, k), random(width, k, scale=k**-0.5), random(rows, width), random(width)
    given = random.norm(kind, width)
    parts = on_device(product.parts, x, weight)
    assert parts.shape[1:] == (rows, width)
    assert parts.dtype == torch.float32
    total, normalized = on_device(norm.add_norm, hidden, parts, bias if rows != 8 else None, given)
    wanted = reference.add_norm(hidden, parts, bias if rows != 8 else None, given)
    plus = 0 if rows == 8 else bias.double()
    truth = hidden.double() + x.double() @ weight.double().T + plus
    hold(total, wanted[0], truth)
    identity = torch.eye(width, dtype=torch.float64, device=x.device)
    hold(normalized, wanted[1], exact_linear(truth, identity, None, double(given), None, None))


def test_parts_split_where_programs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "supports", lambda x, weight: False)
    chosen = product.plan(64, 768, 3072, False, True, 2)
    assert -(-3072 // chosen.share) > 4
    random = Random(1, "float16")
    x, weight = random(20, 640), random(48, 640)
    parts = on_device(product.parts, x, weight)
    assert parts.shape[0] == 5
    assert torch.allclose(parts.sum(0), x.float() @ weight.float().T, atol=2e-2)


@pytest.mark.parametrize("kind", NORMS[1:])
def test_norm_alone(kind: str) -> None:
    random = Random(2, "float16")
    hidden, given = random(3, 200), random.norm(kind, 200)
    moved = there(hidden)
    total, normalized = norm.add_norm(moved, None, None, there(given))
    assert total is moved
    identity = torch.eye(200, dtype=torch.float64)
    truth = exact_linear(hidden.double(), identity, None, double(given), None, None)
    hold(normalized.cpu(), reference.normalize(hidden, given), truth)


@pytest.mark.parametrize("with_positions", [False, True])
def test_embed(with_positions: bool) -> None:
    random = Random(3, "float16")
    table, positions_table = random(50, 1100), random(9, 1100) if with_positions else None
    tokens = torch.tensor([[3, 0], [49, 0], [0, 0]])
    positions = torch.tensor([8, 0, 3], dtype=torch.int32)
    got = norm.embed(there(tokens)[:, 0], *map(there, (positions, table, positions_table)))
    assert torch.equal(got.cpu(), reference.embed(tokens[:, 0], positions, table, positions_table))


def test_extreme_values_stay_finite() -> None:
    """Activations far from zero neither overflow nor turn NaN."""
    weight = torch.eye(64, dtype=torch.float16, device=DEVICE)
    x = torch.linspace(-3e4, 3e4, 64, device=DEVICE).half()[None]
    for run in (linear.linear, product.product):
        out = run(x, weight, activation="gelu")
        assert torch.equal(out, x.clamp(min=0))
        gated = run(x, torch.cat([weight, 1e-5 * weight]), activation="silu")
        assert torch.isfinite(gated).all()


@pytest.mark.parametrize(
    "run", [linear.linear, reference.linear, product.product], ids=["linear", "reference", "product"]
)
def test_bad_arguments(run) -> None:
    x, weight = torch.zeros(2, 32, device=DEVICE), torch.zeros(8, 32, device=DEVICE)
    with pytest.raises(ValueError, match="not \\[M, K\\] and \\[N, K\\]"):
        run(x[:, :16].contiguous(), weight)
    with pytest.raises(ValueError, match=r"bias is \(7,\), not \(8,\)"):
        run(x, weight, torch.zeros(7, device=DEVICE))
    with pytest.raises(ValueError, match="activation is 'relu'"):
        run(x, weight, activation="relu")
    with pytest.raises(ValueError, match="weight is not a contiguous"):
        run(x, torch.zeros(32, 8, device=DEVICE).T)
    with pytest.raises(ValueError, match="x is not a contiguous tensor of the weight's dtype"):
        run(x.half(), weight)
    if run is not reference.linear:
        with pytest.raises(ValueError, match="x has 129 rows"):
            run(torch.zeros(129, 32, device=DEVICE), weight)


def test_plans() -> None:
    """Enough programs for every multiprocessor at GPT-2's sizes; whole K where it fits; parts that cover K."""
    for width, k in ((2304, 768), (768, 768), (3072, 768), (768, 3072), (6144, 4096), (4096, 14336)):
        plan = linear.plan(width, k, 1, False, 2)
        assert plan.num_programs >= 4 * linear.NUM_SMS
        assert plan.num_tiles * plan.block_n >= width
        assert (plan.block_k >= k) == (k <= linear.WHOLE_K)
    for rows in (5, 16, 17, 64, 128):
        for k in (96, 768, 3072, 14336):
            for partial in (False, True):
                plan = product.plan(rows, 768, k, False, partial, 2)
                assert plan.share % plan.block_k == 0
                assert plan.share >= k or partial
                tiles = plan.block_k * 2 * (plan.block_m + plan.block_n)
                assert plan.stages * tiles <= product.SHARED_BYTES


def test_hopper_plans() -> None:
    """Shares that cover K and run at once, a ring that fits, and in it more than the tile that is worked on."""
    for rows in (1, 5, 16, 17, 64, 100, 128):
        for width, k in ((768, 96), (768, 768), (768, 3072), (4096, 14336), (50257, 768)):
            for gated, partial in ((False, False), (True, False), (False, True)):
                for num_sms in (78, 114, 132):
                    tiles = -(-width // hopper.BLOCK_N)
                    assert hopper.plan(rows, width, k, gated, True, num_sms).splits <= max(1, num_sms // tiles)
                plan = hopper.plan(rows, width, k, gated, partial)
                assert plan.block_m >= rows or (plan.block_m == 32 and width * k <= hopper.SMALL)
                assert (plan.splits - 1) * plan.steps * hopper.BLOCK_K < k <= plan.splits * plan.steps * hopper.BLOCK_K
                assert plan.splits == 1 or partial
                assert plan.stages >= min(plan.steps, 3)
                tiles = 2 * hopper.BLOCK_K * (hopper.BLOCK_N * (1 + gated) + plan.block_m)
                assert plan.stages * tiles <= hopper.RING_BYTES


@pytest.mark.skipif(DEVICE != "cpu", reason="it would not end on a device")
def test_a_ring_of_one_tile_would_not_end() -> None:
    """What ``gluon_numpy.py`` says of a refill that waits for its own product."""
    run, x = hopper_in_numpy(), torch.zeros(8, 256, dtype=torch.float16)
    launch = run["stream_kernel"][1, 1]
    tiles = [run["tiles_of"](x, 8), run["tiles_of"](x, 64)]
    sizes = {
        "BLOCK_M": 8,
        "BLOCK_N": 64,
        "BLOCK_K": 128,
        "STEPS": 2,
        "ACTIVATION": None,
        "PARTIAL": False,
        "EARLY": False,
    }
    launch(*tiles, None, torch.empty(8, 8, dtype=torch.float16), 8, 8, STAGES=2, **sizes)
    with pytest.raises(AssertionError, match="a wait that never ends"):
        launch(*tiles, None, torch.empty(8, 8, dtype=torch.float16), 8, 8, STAGES=1, **sizes)


def test_hopper_takes_what_its_copy_engine_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        """A tensor as far as ``supports`` looks."""

        def __init__(self, shape, size=2, at=0) -> None:
            self.shape, self.size, self.at = shape, size, at
            self.device = torch.device("cuda")

        def element_size(self) -> int:
            return self.size

        def data_ptr(self) -> int:
            return self.at

    weight = Cuda((64, 96))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert hopper.supports(Cuda((8, 96)), weight)
    assert not hopper.supports(Cuda((8, 96), size=4), weight)
    assert not hopper.supports(Cuda((8, 100)), Cuda((64, 100)))
    assert not hopper.supports(Cuda((8, 96), at=8), weight)
    assert not hopper.supports(Cuda((8, 96)), Cuda((64, 96), at=2))
    for capability in ((8, 0), (8, 9), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, known=capability: known)
        assert not hopper.supports(Cuda((8, 96)), weight)
    assert not hopper.supports(torch.zeros(8, 96).half(), torch.zeros(64, 96).half())
