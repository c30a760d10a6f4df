"""What 16 bits alone do to log probabilities behind a cache of few bits: transformers in 16 against 32 bits.

    PYTHONPATH=.:tests/support python sixteen-bits.py DEVICE METHOD...

The random Llama, prompts and lengths of docs/serving.md.  Tokens are chosen in float32 with each cache, and replayed
in float16 and bfloat16 with the same.  No engine takes part, so what differs is rounding.
"""

import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm_replay import replay

import kvruntime
from kvruntime.hf.cache import argument
from kvsim.specs import parse_method

LENGTHS, NEW = [150, 97, 600, 5, 1000, 129], 60
device, *specs = sys.argv[1:]
torch.manual_seed(0)
SHAPE = {
    "vocab_size": 128, "hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 128, "max_position_embeddings": 2048, "initializer_range": 0.08, "num_hidden_layers": 3,
}  # fmt: skip
model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval().to(device)
generator = torch.Generator().manual_seed(3)
prompts = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in LENGTHS]


def chosen(prompt, method):
    """Greedy tokens in float32 and their log probabilities, token by token as an engine decodes."""
    cache = kvruntime.make_cache(model, method)
    row = {"prompt": prompt, "tokens": [], "logprobs": [], "cached": 0}
    given = torch.tensor([prompt], device=device)
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(given, use_cache=True, **argument(cache)).logits[0, -1].log_softmax(-1)
        given = logits.argmax()[None, None]
        row["tokens"].append(int(given))
        row["logprobs"].append(logits.max().item())
    return row


for spec in specs:
    rows = [chosen(prompt, parse_method(spec, {}, "float32")) for prompt in prompts]
    for dtype in ("float16", "bfloat16"):
        half = LlamaForCausalLM._from_config(model.config, dtype=getattr(torch, dtype)).eval().to(device)
        half.load_state_dict(model.state_dict())  # rotary frequencies stay in float32, as from_pretrained has them
        apart = [replay(half, row, parse_method(spec, {}, dtype)) for row in rows]
        mean = sum(row.mean for row in apart) / len(apart)
        told = {"method": spec, "dtype": dtype, "greedy": sum(row.greedy for row in apart)}
        told |= {"tokens": NEW * len(prompts), "mean": round(mean, 5), "worst": [round(row.worst, 4) for row in apart]}
        print(json.dumps(told), flush=True)
