"""The engine against stock ``generate()`` with the same cache: the same greedy tokens, ragged batches included."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

from runtime_tiny import tiny_model  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from kvruntime import Engine, make_cache  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = {"fp32": {}, "kivi": {"nbits": 4, "residual_length": 32}, "kivi-seed": {}}
CASES = [(family, method) for family in ("llama", "gpt2", "qwen3") for method in ("fp32", "kivi")]
CASES += [("gpt2", "kivi-seed")]


def gpt2():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=2, n_positions=256, initializer_range=0.3)
        return GPT2LMHeadModel(config).eval()


def qwen3():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = Qwen3Config(**sizes, **heads, max_position_embeddings=256, initializer_range=0.3)
        return Qwen3ForCausalLM(config).eval()


MODELS = {"llama": tiny_model, "gpt2": gpt2, "qwen3": qwen3}
PROMPTS = [list(range(2, 72)), [5, 9, 3], list(range(100, 60, -1))]


def stock(model, method, options, prompts, new):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts], device=DEVICE)
    cache = make_cache(model, method, max_seq_len=longest + new, **options)
    out = model.generate(
        ids, attention_mask=mask, **argument(cache), max_new_tokens=new, do_sample=False, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    return out[:, longest:].tolist()


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize(("family", "method"), CASES)
def test_greedy_tokens_are_those_of_generate(family: str, method: str, lean: bool) -> None:
    model = MODELS[family]().to(DEVICE)
    make_cache(model, "fp16")  # whose hooks are no reason to run anything slower
    engine = Engine(model, method, batch_size=3, max_seq_len=180, lean=lean, **METHODS[method])
    fused = lean and family != "qwen3"
    assert engine.layers == ("fused kernels" if fused else "the model's own modules")
    got = engine.generate(PROMPTS, max_new_tokens=40)
    assert got == stock(model, method, METHODS[method], PROMPTS, 40)
    assert engine.lengths == [len(prompt) + 39 for prompt in PROMPTS]
    again = engine.generate(PROMPTS[::-1], max_new_tokens=10)  # reused: nothing of the first batch is left
    assert again == [row[:10] for row in got[::-1]]


def test_stop_stream_and_sample() -> None:
    engine = Engine(tiny_model().to(DEVICE), "kivi", batch_size=3, max_seq_len=128)
    whole = engine.generate(PROMPTS, max_new_tokens=12)
    heard: list[tuple[int, int]] = []
    stop = whole[0][4]
    cut = engine.generate(PROMPTS, max_new_tokens=12, eos=stop, on_token=lambda *pair: heard.append(pair))
    for row, tokens in enumerate(cut):
        ends = whole[row].index(stop) + 1 if stop in whole[row] else 12
        assert tokens == whole[row][:ends]
        assert [token for at, token in heard if at == row] == tokens
    how = {"max_new_tokens": 12, "temperature": 2.0, "top_k": 50, "top_p": 0.95}
    sampled = [engine.generate(PROMPTS, **how, seed=seed) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert engine.generate(PROMPTS, max_new_tokens=12, temperature=1.0, top_k=1) == whole


def test_fill_and_step() -> None:
    model = tiny_model().to(DEVICE)
    engine = Engine(model, "kivi", batch_size=2, max_seq_len=200, residual_length=32)
    engine.fill([150, 3], seed=1)
    engine.tokens.copy_(torch.tensor([7, 8]))
    for _ in range(40):
        engine.step()
    assert engine.lengths == [190, 43]
    assert engine.positions.tolist() == [190, 43]
    assert torch.isfinite(engine.logits).all()
    assert engine.cache.stores[0].tensors["lengths"].tolist() == [[190, 43], [160, 32]]
    for _ in range(10):
        engine.step()
    with pytest.raises(ValueError, match="200 tokens is full"):
        engine.step()


def test_refused() -> None:
    model = tiny_model()
    for arguments, what in (
        ({"batch_size": 0, "max_seq_len": 10}, "batch_size 0"),
        ({"batch_size": 1, "max_seq_len": 512}, "max_seq_len 512: allowed are up to the model's 256"),
        ({"batch_size": 1, "max_seq_len": 64, "nbits": 5}, "nbits 5"),
    ):
        with pytest.raises(ValueError, match=what):
            Engine(model, "kivi", **arguments)
    engine = Engine(model, "fp32", batch_size=2, max_seq_len=64)
    for prompts, what in (([[1]], "1 rows"), ([[1], []], "without a token"), ([[1] * 60, [1]], "69 tokens do not fit")):
        with pytest.raises(ValueError, match=what):
            engine.generate(prompts, max_new_tokens=10)
    bad = ({"temperature": -1.0}, "temperature -1"), ({"top_k": 0}, "top_k 0"), ({"top_p": 0.0}, "top_p 0")
    for options, what in bad:
        with pytest.raises(ValueError, match=what):
            engine.generate([[1], [1]], max_new_tokens=1, **options)
