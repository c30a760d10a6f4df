"""Boot logs and lines of them, that tests of the doctor share."""

from kvsim.analysis.doctor import Diagnosis
from kvsim.models.load import load_model

LLAMA = load_model("llama-3.1-8b")
BOOT_019 = """\
(EngineCore pid=243) INFO 04-22 01:47:25 [v1/engine/core.py:105] Initializing a V1 LLM engine (v0.19.0) with config: \
model='meta-llama/Llama-3.1-8B-Instruct', dtype=torch.bfloat16, max_seq_len=16384, tensor_parallel_size=1, \
pipeline_parallel_size=1, quantization=None, kv_cache_dtype=auto, device_config=cuda
(APIServer pid=1) INFO [config/scheduler.py:238] Chunked prefill is enabled with max_num_batched_tokens=8192.
(APIServer pid=1) DEBUG [engine/arg_utils.py:2242] Defaulting max_num_seqs to 1024 for OPENAI_API_SERVER usage context.
(APIServer pid=1) INFO [entrypoints/utils.py:233] non-default args: {'max_model_len': 16384, \
'gpu_memory_utilization': 0.95, 'enable_prefix_caching': False}
DEBUG [v1/worker/gpu_worker.py:284] worker init memory snapshot: free_memory=78.68GiB, total_memory=79.19GiB
INFO [v1/worker/gpu_model_runner.py:4820] Model loading took 14.99 GiB memory and 21.3 seconds
DEBUG [v1/worker/gpu_worker.py:435] Total non KV cache memory: 17.12GiB; torch peak memory increase: 1.89GiB; \
non-torch forward increase memory: 0.25GiB; weights memory: 14.99GiB.
INFO 04-22 01:47:55 [v1/worker/gpu_worker.py:436] Available KV cache memory: 58.11 GiB
INFO 04-22 01:47:55 [v1/core/kv_cache_utils.py:1319] GPU KV cache size: 476,016 tokens
INFO 04-22 01:47:55 [v1/core/kv_cache_utils.py:1324] Maximum concurrency for 16,384 tokens per request: 29.05x
INFO 04-22 01:47:59 [v1/worker/gpu_model_runner.py:6046] Graph capturing finished in 3 secs, took 0.91 GiB
"""
"""llm-d-incubation/llm-d-planner, accuracy/results/v0.19.0/logs, Llama-3.1-8B on an H100."""
V0_PROFILE = """\
INFO Loading model weights took 14.9888 GB
INFO Memory profiling results: duration=3.21 seconds, total_gpu_memory=47.50GiB, initial_memory_usage=15.40GiB, \
peak_torch_memory=17.10GiB, memory_usage_post_profile=15.51GiB, non_torch_memory=0.40GiB, kv_cache_size=25.25GiB, \
gpu_memory_utilization=0.90.
INFO # GPU blocks: 12928, # CPU blocks: 2048
INFO Maximum concurrency for 16384 tokens per request: 12.62x
"""
TWO_MODELS = """\
srv    load_model: loading model '/models/target-24B.gguf'
print_info: n_layer          = 40
print_info: n_embd_k_gqa     = 1024
print_info: n_embd_v_gqa     = 1024
llama_context: n_ctx         = 4096
llama_kv_cache:      CUDA0 KV buffer size =   640.00 MiB
llama_kv_cache: size =  640.00 MiB (  4096 cells,  40 layers,  1/1 seqs), K (f16):  320.00 MiB, V (f16):  320.00 MiB
srv    load_model: loading draft model 'C:\\models\\draft.gguf'
print_info: n_layer          = 16
print_info: n_embd_k_gqa     = 512
print_info: n_embd_v_gqa     = 512
llama_context: n_ctx         = 4096
llama_kv_cache:      CUDA0 KV buffer size =   128.00 MiB
llama_kv_cache: size =  128.00 MiB (  4096 cells,  16 layers,  1/1 seqs), K (f16):   64.00 MiB, V (f16):   64.00 MiB
"""


def figures(diagnosis: Diagnosis) -> dict[str, tuple[float | None, float, float | None]]:
    return {each.what: (each.predicted, each.reported, each.error) for each in diagnosis.findings}


def engine_line(version: str = "0.19.0", v: str = "V1 ", **settings: object) -> str:
    told = {
        "model": "'meta-llama/Llama-3.1-8B-Instruct'",
        "dtype": "torch.bfloat16",
        "max_seq_len": 16384,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "quantization": None,
        "kv_cache_dtype": "auto",
    } | settings
    listed = ", ".join(f"{name}={value}" for name, value in told.items())
    return f"INFO [core.py:1] Initializing a{'' if v else 'n'} {v}LLM engine (v{version}) with config: {listed}\n"


def needs(needed: str, available: str, longest: str, style: str = "(") -> str:
    return (
        f"ERROR ValueError: To serve at least one request with the model's max seq len (65536), {style}{needed} KV "
        f"cache is needed, which is larger than the available KV cache memory ({available}). Based on the available "
        f"memory, the estimated maximum model length is {longest}. Try increasing `gpu_memory_utilization`"
    )
