"""One pip-installed planner, asked for the cache of many configs: run in a process of its own, without kvsim.

    python planner_subject.py NAME < {"ctx": 32768, "configs": {id: config}}  > {id: {"nbytes": n} or {"refused": why}}

Each function below calls the planner's own code on the config.json, past the download that it would begin with;
nothing of its arithmetic is replaced.  The cache is 16 bits wide, one sequence.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Config = dict[str, Any]


def kvfit(config: Config, ctx: int) -> float:
    from kvfit.architectures import estimate_cache

    return float(estimate_cache(config, context_tokens=ctx, kv_bytes=2.0).total_bytes)


def vramcalc(config: Config, ctx: int) -> float:
    from vramcalc import estimate

    found = estimate(config, mode="inference", dtype="bf16", batch=1, seq_len=ctx)
    return float(next(size for name, size in vars(found).items() if name.startswith("kv")))


def servcalc(config: Config, ctx: int) -> float:
    from servcalc import Workload, estimate

    found = estimate(config, "H100 80GB", workload=Workload(prompt_len=1024, gen_len=512))
    return float(found.kv_bytes_per_token) * ctx


def ridgepoint(config: Config, ctx: int) -> float:
    from ridgepoint import fit, hf

    hf._download_json = lambda *_: config
    hf._params_from_index = lambda *_: 1_000_000_000  # weights are not asked for
    found = json.loads(fit("a/b", "h100-80gb", count=8, ctx=ctx, prompt=ctx, as_json=True))
    return float(found["capacity"]["bytes_per_seq"])


def hf_mem(config: Config, ctx: int) -> float:
    from hf_mem.safetensors.kv_cache import compute_safetensors_kv_cache_size

    inner = config.get("text_config") or config  # as hf_mem.run does
    return float(compute_safetensors_kv_cache_size(inner, "BF16", ctx, 1))


def fitcheck_llm(config: Config, ctx: int) -> float:
    from fitcheck.config_parser import _parse_fields, _reject_unsupported
    from fitcheck.memory.inference import _kv_cache_bytes

    _reject_unsupported(config, "a/b")
    return float(_kv_cache_bytes(_parse_fields(config), ctx, 1, 2))  # type: ignore[arg-type]


def hf_vram_calc(config: Config, ctx: int) -> float:
    from hf_vram_calc.calculator import VRAMCalculator
    from hf_vram_calc.config import ConfigManager
    from hf_vram_calc.parser import ConfigParser

    parsed = ConfigParser.parse_config(_folder(config), "a/b")
    return float(VRAMCalculator(ConfigManager()).calculate_kv_cache_memory(parsed, "bf16", 1, ctx)) * (1 << 30)


def llm_analysis(config: Config, ctx: int) -> float:
    from llm_analysis.analysis import LLMAnalysis
    from llm_analysis.config import get_dtype_config_by_name, get_gpu_config_by_name, get_model_config_from_hf

    model = get_model_config_from_hf(_folder(config))
    found = LLMAnalysis(model, get_gpu_config_by_name("a100-sxm-80gb"), get_dtype_config_by_name("w16a16e16"))
    return float(found.get_memory_kv_cache_per_layer(1, ctx)) * model.num_layers


def llm_d_planner(config: Config, ctx: int) -> float:
    from planner.capacity_planner import KVCacheDetail, get_model_config_from_hf

    return float(KVCacheDetail("a/b", get_model_config_from_hf(_folder(config)), ctx, 1).per_request_kv_cache_bytes)


def _folder(config: Config) -> str:
    """A model directory for transformers, which reads the config with its own classes: no code is fetched, and the
    weights' quantization is left out, because a cache of 16 bits is asked for."""
    plain = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    folder = tempfile.mkdtemp(dir=SCRATCH.name)
    Path(folder, "config.json").write_text(json.dumps(plain), encoding="utf-8")
    return folder


SCRATCH = tempfile.TemporaryDirectory()
PLANNERS: dict[str, Callable[[Config, int], float]] = {
    "kvfit": kvfit,
    "ridgepoint": ridgepoint,
    "hf-mem": hf_mem,
    "llm-d-planner": llm_d_planner,
    "vramcalc": vramcalc,
    "servcalc": servcalc,
    "hf-vram-calc": hf_vram_calc,
    "llm-analysis": llm_analysis,
    "fitcheck-llm": fitcheck_llm,
}


def main() -> None:
    question, ask = json.load(sys.stdin), PLANNERS[sys.argv[1]]
    answers: dict[str, dict[str, Any]] = {}
    for name, config in question["configs"].items():
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                answers[name] = {"nbytes": ask(config, question["ctx"])}
        except ImportError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            raise SystemExit(3) from None
        except BaseException as error:  # whatever a planner does with a config it does not know is its answer
            answers[name] = {"refused": f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]}
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
