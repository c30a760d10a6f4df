"""What engines take: vLLM against 59 published boot logs' figures, llama.cpp against its printed sizes."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsim.engines import ENGINES, Engine, Ideal, Kvruntime, LlamaCpp, Vllm, make_engine
from kvsim.engines.engine import Group
from kvsim.engines.vllm import block_nbytes, server_defaults
from kvsim.hardware import find_hardware
from kvsim.layout import LayerShape, StateShape, nbytes
from kvsim.memory.estimate import estimate
from kvsim.methods import Fp8, Full, Kivi, LayerMix, Nvfp4, Paged, TurboQuant, make_method
from kvsim.models.families import FAMILIES
from kvsim.models.gguf_windows import WINDOWED
from kvsim.models.load import load_model
from kvsim.models.model import Model

GIB, MIB = 1 << 30, 1 << 20
LLAMA = load_model("llama-3.1-8b")
KIVIS = LayerMix(first=1, last=0, exact=Kivi(4), inner=Kivi())
STATE = StateShape((("conv", (10, 3), "bfloat16"),))


def shaped(*kinds: tuple[int, LayerShape | StateShape]) -> Model:
    return replace(LLAMA, layers=tuple(layer for count, layer in kinds for _ in range(count)))


def dense(layers: int, heads: int, dim: int) -> Model:
    return shaped((layers, LayerShape(heads, dim, dim)))


def windowed(full: int, windows: int, width: int, heads: int, dim: int, kind: str = "") -> Model:
    window = LayerShape(heads, dim, dim, window=width, kind=kind)
    return shaped((windows, window), (full, LayerShape(heads, dim, dim)))


# model (heads a rank), max_model_len, GiB available, tokens and concurrency as vLLM 0.19.0 printed them on an H100
# (llm-d-incubation/llm-d-planner, accuracy/results/v0.19.0/logs, file named after the model)
BOOTS = {
    "llama-3.1-8b": (dense(32, 8, 128), Full(), 16384, 58.11, 476_016, 29.05),
    "llama-3.1-8b fp8": (dense(32, 8, 128), Fp8(), 8192, 58.11, 952_032, 116.21),
    "llama-3.1-8b fp32": (dense(32, 8, 128), Full("float32"), 8192, 42.8, 175_296, 21.40),
    "llama-3.3-70b tp4": (dense(80, 2, 128), Full(), 8192, 54.09, 708_992, 86.55),
    "qwen2.5-7b": (dense(28, 4, 128), Full(), 32768, 58.53, 1_096_000, 33.45),
    "codellama-7b": (dense(32, 32, 128), Full(), 8192, 61.66, 126_256, 15.41),
    "phi-2": (dense(32, 32, 80), Full(), 2048, 69.0, 226_112, 110.41),
    "gemma-7b": (dense(28, 16, 256), Full(), 8192, 55.44, 129_760, 15.84),
    "deepseek-v2-lite": (shaped((27, LayerShape(1, 576, 0, kind="mla"))), Full(), 8192, 43.61, 1_505_552, 183.78),
    "gemma-2-9b": (windowed(21, 21, 4096, 8, 256), Full(), 8192, 54.12, 168_880, 20.60),
    "gemma-2-27b": (windowed(23, 23, 4096, 16, 128), Full(), 8192, 20.59, 58_672, 7.16),
    "gemma-3-4b": (windowed(5, 29, 1024, 4, 256), Full(), 8192, 62.51, 468_144, 57.05),
    "gemma-3-12b": (windowed(8, 40, 1024, 8, 256), Full(), 8192, 47.72, 130_304, 15.88),
    "gemma-3-27b": (windowed(10, 52, 1024, 16, 128), Full(), 8192, 19.53, 36_560, 4.46),
    "gpt-oss-20b tp2": (windowed(12, 12, 128, 4, 64), Full(), 8192, 59.32, 2_591_776, 316.07),
    "llama-4-scout tp4": (windowed(12, 36, 8192, 2, 128, "chunked"), Full(), 8192, 16.75, 365_968, 44.68),
}


@pytest.mark.parametrize("name", BOOTS)
def test_vllm_sizes_its_pool_as_it_printed(name: str) -> None:
    model, method, max_model_len, available, tokens, concurrency = BOOTS[name]
    low, high = (
        Vllm().pool(model, method, int((available + step) * GIB), max_model_len) for step in (-0.005, 0.005)
    )  # the log rounds the bytes to two decimals
    assert low.num_tokens_before <= tokens <= high.num_tokens_before
    assert low.concurrency - 0.005 <= concurrency <= high.concurrency + 0.005


def test_vllm_lengthens_blocks_for_states() -> None:
    """Qwen3.5-27B, fp8: "attention block size to 1568 tokens", "page size by 0.13%" (aivrar/vllm-windows-build#17)."""
    state = StateShape((("conv", (10240, 4), "bfloat16"), ("recurrent", (48, 128, 128), "float32")))
    model = replace(shaped((48, state), (16, LayerShape(4, 256, 256))), model_type="qwen3_5_text")
    groups = Vllm().groups(model, Fp8())
    assert {group.block_size for group in groups} == {1568}
    assert [group.kind for group in groups] == ["full", "state", "state", "state"]
    page = groups[0].page_nbytes // 16
    assert page == 1568 * 4 * 2 * 256
    assert page / (10240 * 3 * 2 + 48 * 128 * 128 * 4) == pytest.approx(1.0013, abs=5e-5)
    pool = Vllm().pool(model, Fp8(), 20 * GIB, 32768)
    assert pool.blocks_per_request == 21 + 3
    assert sum(Vllm().parts(model, Fp8(), 2, 32768).values()) == (2 * 24 + 1) * pool.block_nbytes


def test_vllm_states_in_a_smaller_model() -> None:
    """Qwen3.5-9B: "attention block size to 528 tokens", "mamba page size by 0.76%" (vllm#37467)."""
    state = StateShape((("conv", (8192, 4), "bfloat16"), ("recurrent", (32, 128, 128), "float32")))
    shape = shaped((24, state), (8, LayerShape(4, 256, 256)))
    model = replace(shape, model_type="qwen3_5_text")
    assert Vllm().groups(model, Full())[0].block_size == 528
    state_nbytes = 8192 * 3 * 2 + 32 * 128 * 128 * 4
    assert 528 * 4096 / state_nbytes == pytest.approx(1.0076, abs=5e-5)
    other = replace(shape, model_type="qwen3_next")  # vLLM keeps these states in the model's own type
    assert Vllm().parts(other, Full(), 1, 100)["state_recurrent"] == 24 * 32 * 128 * 128 * 2


def test_vllm_blocks_of_a_plain_model() -> None:
    """1381 blocks serve 10.79 requests of 2048 tokens (vllm#12569), 1952 serve 1.56 of 20000 (vllm#10517)."""
    model = dense(80, 8, 128)
    block = block_nbytes(Vllm().groups(model, Full()))
    assert block == 16 * 80 * 8 * 2 * 128 * 2
    assert round(Vllm().pool(model, Full(), 1381 * block, 2048).concurrency, 2) == 10.79
    pool = Vllm().pool(LLAMA, Full(), int(3.8125 * GIB), 20000)
    assert pool.num_gpu_blocks == 1952
    assert round(pool.concurrency, 2) == 1.56
    taken = Vllm().parts(LLAMA, Full(), 3, 1000)
    assert sum(taken.values()) == (3 * 63 + 1) * 16 * 131072
    assert taken["null_block"] == 16 * 131072
    assert taken["padding"] == 3 * 8 * 131072


def test_vllm_without_groups_treats_windows_as_full() -> None:
    model = windowed(10, 52, 1024, 16, 128)
    groups = Vllm(disable_hybrid_kv_cache_manager=True).groups(model, Full())
    assert groups == (Group("full", 62, 16, 62 * 131072),)
    assert sum(Vllm().parts(model, Full(), 1, 131072).values()) < sum(
        Vllm(disable_hybrid_kv_cache_manager=True).parts(model, Full(), 1, 131072).values()
    )


def test_vllm_windows_keep_the_tokens_in_flight() -> None:
    model = windowed(12, 12, 128, 8, 64)
    for batched, blocks in ((512, -(-639 // 16) + 1), (2048, -(-2175 // 16) + 1), (100_000, 1024 + 1)):
        engine = Vllm(max_num_batched_tokens=batched)
        assert engine.blocks(engine.groups(model, Full()), 16384) == 1024 + blocks


def test_vllm_pages_of_kvruntimes_plugin() -> None:
    """As vLLM 0.26.0 and 0.32.0 print it: 1 GiB, 3 layers of 4 heads of 128, float32, requests of 2,048 tokens: 14,563
    blocks, "KV cache size: 368,210 tokens", 179.79x.  And what an 8B model gains over 16 bits at 32k."""
    tiny = shaped((3, LayerShape(4, 128, 128)))
    pool = Vllm().pool(tiny, Kivi(dtype="float32"), GIB, 2048)
    assert (pool.num_gpu_blocks, pool.blocks_per_request, pool.num_tokens) == (14563, 32 + 49, 368_210)
    assert f"{pool.concurrency:.2f}" == "179.79"
    llama = shaped((32, LayerShape(8, 128, 128)))
    plain = Vllm().pool(llama, Full("bfloat16"), 100 * GIB, 32768)
    for bits, least, blocks in ((2, 5.0, 512 + 25), (4, 3.0, 512 + 13)):
        pool = Vllm().pool(llama, Kivi(bits, dtype="bfloat16"), 100 * GIB, 32768)
        assert pool.blocks_per_request == blocks
        assert pool.num_tokens / plain.num_tokens > least
    for bits, least in ((3, 5.1), (4, 3.8)):  # no exact tokens, and no second group
        pool = Vllm().pool(llama, TurboQuant(bits), 100 * GIB, 32768)
        assert (pool.blocks_per_request, len(pool.groups)) == (512, 1)
        assert pool.num_tokens / plain.num_tokens > least
        assert "CUSTOM" in " ".join(Vllm().notes(llama, TurboQuant(bits)))
    notes = " ".join(Vllm().notes(llama, Kivi()))
    assert "CUSTOM" in notes
    assert "padding" not in notes


def test_vllm_windows_beside_kvruntimes_plugin() -> None:
    """As vLLM 0.26.0 and 0.32.0 print it of a Gemma 3: 1 GiB, windows of 48 in three layers of five, 4 heads of 64,
    float32, requests of 1,024 tokens: 43,690 blocks, "KV cache size: 491,632 tokens", 480.11x."""
    gemma = shaped((2, LayerShape(4, 64, 64)), (3, LayerShape(4, 64, 64, window=48)))
    pool = Vllm().pool(gemma, Kivi(dtype="float32"), GIB, 1024)
    assert (pool.num_gpu_blocks, pool.blocks_per_request, pool.num_tokens) == (43690, 16 + 49 + 2 * 13, 491_632)
    assert f"{pool.concurrency:.2f}" == "480.11"
    assert [group.num_layers for group in pool.groups] == [2, 2, 2, 2]
    coded = Vllm().pool(gemma, TurboQuant(3), GIB, 1024)  # vLLM 0.32.0 had as many blocks
    assert (coded.num_gpu_blocks, [group.kind for group in coded.groups]) == (40_329, ["full", *["exact window"] * 2])
    stored = Vllm().stored(gemma, Kivi(dtype="float32"))
    assert Vllm().groups(gemma, stored) == pool.groups
    taken = Vllm().parts(gemma, Kivi(dtype="float32"), 1, 1024)
    assert sum(taken.values()) == (pool.blocks_per_request + 1) * pool.block_nbytes
    assert taken["key"] == 3 * 48 * 4 * 64 * 4
    notes = Vllm().notes(gemma, Kivi(dtype="float32"))
    assert "1 padding layers make the groups equal" in notes  # as vLLM's log says of this model
    assert any("windows are not packed" in note for note in notes)


def test_vllm_sparse_attention_has_its_own_bytes() -> None:
    latent, index = LayerShape(1, 576, 0, kind="mla"), LayerShape(1, 128, 0, kind="indexer")
    model = shaped((61, latent), (61, index))
    taken = Vllm().parts(model, Full("bfloat16"), 1, 6400)
    assert taken["index_key"] == 61 * 132 * 6400
    assert sum(taken.values()) == 61 * (1152 + 132) * (6400 + 64)
    assert sum(Vllm().parts(model, Fp8(), 1, 6400).values()) == 61 * (656 + 132) * (6400 + 64)
    assert Ideal().parts(model, Full(), 1, 6400)["index_key"] == 61 * 256 * 6400


def test_vllm_per_token_head_and_nvfp4_pages() -> None:
    for name, a_head in (("int8", 2 * (128 + 4)), ("int4", 2 * (64 + 4)), ("fp8-token-head", 2 * 132), ("nvfp4", 144)):
        assert block_nbytes(Vllm().groups(LLAMA, make_method(name))) == 16 * 32 * 8 * a_head
    mla = shaped((27, LayerShape(1, 576, 0, kind="mla")))
    assert block_nbytes(Vllm().groups(mla, make_method("int8"))) == 16 * 27 * (576 + 8)


# activation peak, not PyTorch's, and CUDA graphs in GiB, of the same logs: model, tensor parallel, figures
OVERHEADS = [
    ({"hidden_size": 4096, "vocab_size": 128256}, 32, 1, 1.89, 0.25, 0.91),
    ({"hidden_size": 4096, "vocab_size": 128256}, 32, 2, 1.89, 2.07, 0.76),
    ({"hidden_size": 3584, "vocab_size": 152064}, 28, 1, 2.21, 0.24, 0.86),
    ({"hidden_size": 3072, "vocab_size": 256000}, 28, 1, 3.63, 0.25, 0.94),
    ({"hidden_size": 4096, "vocab_size": 32016}, 32, 1, 0.77, 0.25, 0.89),
    ({"hidden_size": 2048, "vocab_size": 49155}, 40, 1, 0.75, 0.25, 0.84),
    ({"hidden_size": 5120, "vocab_size": 100352}, 40, 1, 1.52, 0.25, 1.07),
    ({"hidden_size": 8192, "vocab_size": 128256}, 80, 2, 1.96, 2.08, 1.79),
    ({"hidden_size": 8192, "vocab_size": 152064}, 80, 4, 2.29, 2.17, 1.54),
]


@pytest.mark.parametrize("row", OVERHEADS, ids=lambda row: f"{row[0]['vocab_size']}-{row[2]}")
def test_vllm_overheads_lie_in_their_bands(row: tuple[dict[str, int], int, int, float, float, float]) -> None:
    from kvsim.engines.vllm import OVERHEAD_BAND

    sizes, layers, ranks, *measured = row
    model = replace(dense(layers, 8, 128), weights=None, **sizes)  # type: ignore[arg-type]
    predicted = Vllm(tensor_parallel_size=ranks).overhead(model, find_hardware("h100-sxm"))
    for name, gib in zip(("activation", "non_torch", "cuda_graphs"), measured, strict=True):
        low, high = OVERHEAD_BAND[name]
        assert low * predicted[name] <= gib * GIB <= high * predicted[name], name


def test_vllm_server_defaults_by_card() -> None:
    assert server_defaults(80 * GIB, "h100-sxm") == {"max_num_batched_tokens": 8192, "max_num_seqs": 1024}
    assert server_defaults(80 * GIB, "a100-80g")["max_num_batched_tokens"] == 2048
    assert server_defaults(180 * GIB)["max_num_batched_tokens"] == 16384
    assert server_defaults(None)["max_num_seqs"] == 256


def test_llama_cpp_prints_these_sizes() -> None:
    """K and V at 8192 cells, and DeepSeek-V4's windows: 4352 cells, 43 layers, 182.75 MiB (llama.cpp#27680)."""
    q8 = LlamaCpp().parts(LLAMA, make_method("q8_0"), 1, 8192)
    assert sum(q8.values()) == 544 * MIB
    assert sum(LlamaCpp().parts(LLAMA, Full(), 1, 8000).values()) == 1024 * MIB  # 8000 -> 8192 cells
    windows = replace(shaped((43, LayerShape(1, 512, 0, window=128))), model_type="deepseek_v4")
    engine = LlamaCpp(n_ubatch=4096)
    assert engine.cells(windows.cache_layers[0], 1, 64000) == 4352
    assert sum(engine.parts(windows, Full(), 1, 64000).values()) / MIB == 182.75


@pytest.mark.parametrize(
    ("name", "tokens", "mib"),
    [("Phi-3-mini-4k-instruct", 4096, 1536), ("Mistral-7B-v0.1", 32768, 4096), ("starcoder2-7b", 16384, 1024)],
)
def test_llama_cpp_has_windows_by_architecture(name: str, tokens: int, mib: int) -> None:
    """What llama.cpp prints of phi3 (its window is off, llama.cpp#13676) and of the llama architecture (#3377)."""
    row = estimate(load_model(name), Full(), 1, tokens, LlamaCpp())
    assert row.nbytes == row.read_nbytes == mib * MIB
    assert estimate(load_model(name), Full(), 1, tokens).nbytes < row.nbytes
    notes = LlamaCpp().notes(load_model(name), Full())
    assert any("is not applied" in note for note in notes)
    assert not any("n_ubatch" in note for note in notes)


@pytest.mark.parametrize("name", ["gemma-2-9b", "gemma-3-27b-it", "gemma-3n-E4B", "gpt-oss-20b"])
def test_llama_cpp_keeps_the_windows_that_it_applies(name: str) -> None:
    model = load_model(name)
    assert LlamaCpp().held(model) is model
    assert LlamaCpp(swa_full=True).parts(model, Full(), 1, 8192) != LlamaCpp().parts(model, Full(), 1, 8192)


def test_every_windowed_family_is_in_llama_cpp_s_table_or_runs_whole() -> None:
    """A new family with a window must be looked up in llama.cpp's src/models."""
    known = {name for names in WINDOWED.values() for name in names}
    whole = {
        "cwm", "dots1", "gpt_neo", "lfm3", "mimo", "ministral", "ministral3", "mistral", "mixtral", "phi3", "phimoe",
        "qwen2", "qwen2_5_omni_text", "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl_text", "qwen3", "qwen3_moe",
        "qwen3_omni_moe_text", "qwen3_vl_moe_text", "qwen3_vl_text", "recurrent_gemma", "smollm3", "starcoder2",
        "vaultgemma",
        # not in llama.cpp at all
        "beam", "cohere_compass_text", "deepseek_v41_text", "doge", "dory", "dots3_note_text", "flint",
        "inkling2_loop_text",
        "inkling2_text", "inkling_text", "kolibri1", "lara_mini", "modernbert-decoder", "muse_glimmer_text",
        "muse_spark_text",
        "phi4_multimodal", "qwen3_omni_moe_talker_text", "voxtral_realtime_text", "zaya",
    }  # fmt: skip
    windowed = {name for name, family in FAMILIES.items() if family.window or family.chunk}
    assert windowed - known == whole


def test_llama_cpp_streams_and_unified() -> None:
    window = LayerShape(4, 256, 256, window=1024)
    assert LlamaCpp().cells(window, 4, 32768) == 4 * 1536
    assert LlamaCpp(kv_unified=True).cells(window, 4, 32768) == 4608
    assert LlamaCpp(swa_full=True).cells(window, 4, 32768) == 4 * 32768
    full = LayerShape(4, 256, 256)
    assert LlamaCpp().cells(full, 3, 100) == 3 * 256
    assert LlamaCpp(kv_unified=True).cells(full, 3, 100) == 512
    state = shaped((1, StateShape((("conv", (10, 3), "bfloat16"),))), (1, full))
    assert LlamaCpp().parts(state, Full(), 2, 100)["state_conv"] == 2 * 20 * 4  # kernel - 1 inputs, float32


def test_kvruntime_grows_in_blocks_of_256() -> None:
    for num_tokens, provided in ((1, 256), (256, 256), (257, 512)):
        assert sum(Kvruntime().parts(LLAMA, Kivi(), 2, num_tokens).values()) == sum(
            Ideal().parts(LLAMA, Kivi(), 2, provided).values()
        )
    assert Kvruntime(max_seq_len=1000).provided(10) == 1000


def test_kvruntime_leaves_windows_and_states_as_they_are() -> None:
    """Packed layers grow in blocks; a window holds its newest tokens in the method's type."""
    full, window = LayerShape(2, 64, 64), LayerShape(2, 64, 64, window=100)
    state = StateShape((("conv", (10, 4), "bfloat16"), ("recurrent", (3, 5), "float32")))
    model, method = shaped((1, full), (2, window), (3, state)), Kivi(dtype="float32")
    for num_tokens, held in ((50, 50), (300, 100)):
        found = Kvruntime().parts(model, method, 2, num_tokens)
        beside = {name: size for name, size in found.items() if name.startswith(("window_", "state_"))}
        each = 2 * 2 * 2 * held * 64 * 4
        assert beside == {
            "window_key": each,
            "window_value": each,
            "state_conv": 3 * 2 * 40 * 4,
            "state_recurrent": 3 * 2 * 15 * 4,
        }
        packed = sum(found.values()) - sum(beside.values())
        assert packed == nbytes(method.buffers(full, 2, Kvruntime().provided(num_tokens)))
    found = estimate(model, method, 2, 300, Kvruntime())
    reads = sum(method.read_parts(full, 2, 300).values()) + 2 * sum(Full("float32").read_parts(window, 2, 300).values())
    assert found.read_nbytes == reads


@pytest.mark.parametrize(
    ("engine", "method", "model", "message"),
    [
        (Vllm(), Kivi(sink_length=4), LLAMA, "kivi-2bit-g32-r128-s4 in pages: sink_length 4, allowed is 0"),
        (Vllm(disable_hybrid_kv_cache_manager=True), Kivi(), LLAMA, "exact tokens as windows: they are disabled"),
        (
            Vllm(),
            Kivi(),
            shaped((2, LayerShape(1, 64, 64, window=128))),
            "pages of one size, kivi-2bit-g32-r128 of these",
        ),
        (Vllm(), LayerMix(first=1, last=0, inner=Kivi()), LLAMA, "stores one method in attention layers alone"),
        (Vllm(), Paged(), LLAMA, "vllm does not store paged"),
        (Vllm(), Full(), shaped((4, LayerShape(1, 512, 0, stride=4))), "compressed layers are not modelled"),
        (LlamaCpp(), Nvfp4(), LLAMA, "llama.cpp does not store nvfp4"),
        (LlamaCpp(flash_attn=False), make_method("q8_0"), LLAMA, "values in q8_0 need flash attention"),
        (Kvruntime(), Fp8(), LLAMA, "kvruntime does not run the method fp8"),
        (Kvruntime(), LayerMix(inner=Kivi()), LLAMA, "kvruntime mixes one kind of method"),
        (Kvruntime(), KIVIS, windowed(3, 1, 100, 2, 64), "allowed is a choice by layer where all layers are full"),
        (Kvruntime(), KIVIS, windowed(0, 4, 4096, 2, 64), "allowed is a choice by layer where all layers are full"),
        (
            Kvruntime(),
            KIVIS,
            shaped((3, LayerShape(2, 64, 64)), (1, STATE)),
            "a choice by layer where all layers are full",
        ),
        (Kvruntime(), Full(), shaped((2, LayerShape(1, 64, 64, window=128))), "this model has none"),
        (
            Kvruntime(),
            Full(),
            shaped((2, LayerShape(1, 512, 0, kind="mla"))),
            "layers only, not mla ones",
        ),
        (Kvruntime(max_seq_len=10), Full(), LLAMA, "100 tokens do not fit max_seq_len 10"),
    ],
)
def test_what_an_engine_does_not_have(engine: Engine, method: Full, model: Model, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.parts(model, method, 1, 100)


def test_engines_by_name() -> None:
    for name in ENGINES:
        engine = make_engine(name)
        assert isinstance(engine, Engine)
        assert engine.name == name
        assert sum(engine.parts(LLAMA, Full(), 2, 300).values()) >= sum(Ideal().parts(LLAMA, Full(), 2, 300).values())
        assert all(size >= 0 for size in engine.overhead(LLAMA, find_hardware("h100")).values())
        assert all(isinstance(line, str) for line in engine.notes(LLAMA, Full()))
    with pytest.raises(LookupError, match="unknown engine 'vlm': did you mean vllm"):
        make_engine("vlm")


def test_latents_are_said_to_be_one_ranks() -> None:
    said = make_engine("kvruntime").notes(load_model("deepseek-v3"), make_method("int8"))
    assert any("tensor parallelism of such models is refused" in line for line in said)
    assert not any("latents" in line for line in make_engine("kvruntime").notes(LLAMA, Full()))
    with pytest.raises(ValueError, match="does not take max_num_seqs"):
        make_engine("ideal", max_num_seqs=4)
    with pytest.raises(ValueError, match="gpu-memory-utilization 2"):
        make_engine("vllm", gpu_memory_utilization=2.0)
    with pytest.raises(ValueError, match="block-size 0"):
        make_engine("vllm", block_size=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6000), st.integers(1, 500), st.sampled_from(["vllm", "llama.cpp"]))
def test_engines_never_shrink(batch_size: int, num_tokens: int, more: int, name: str) -> None:
    state = StateShape((("ssm", (16, 128, 64), "float32"),))
    model = shaped((6, LayerShape(2, 64, 64, window=256)), (3, LayerShape(2, 64, 64)), (5, state))
    engine = make_engine(name)
    size = sum(engine.parts(model, Full(), batch_size, num_tokens).values())
    assert size <= sum(engine.parts(model, Full(), batch_size, num_tokens + more).values())
    assert size <= sum(engine.parts(model, Full(), batch_size + 1, num_tokens).values())
