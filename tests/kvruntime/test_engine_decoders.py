"""Fused decoders against the models' own forward: token after token over a growing cache."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("triton", reason="the runtime extra (triton) is not installed")
transformers = pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

from kvruntime import make_cache  # noqa: E402
from kvruntime.engine import Engine, decoders, linear  # noqa: E402
from kvruntime.engine.decoders import Decoder, lean  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCAB = 211
GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": 96,
    "n_layer": 2,
    "n_head": 3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "gpt2": ("GPT2", GPT2),
    "gpt2 unscaled": ("GPT2", GPT2 | {"scale_attn_weights": False, "n_inner": 200}),
    "gpt2 gelu_pytorch_tanh": ("GPT2", GPT2 | {"activation_function": "gelu_pytorch_tanh"}),
    "llama": ("Llama", LLAMA),
    "llama biases": ("Llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("Llama", LLAMA | {"head_dim": 32, "num_key_value_heads": 6}),
    "llama3 rope": ("Llama", LLAMA | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "yarn": ("Llama", LLAMA | {"rope_parameters": YARN}),
    "mistral": ("Mistral", LLAMA | {"sliding_window": None}),
    "qwen2": ("Qwen2", LLAMA),
}
REFUSED = {
    "gpt2 by layer": ("GPT2", GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2 relu": ("GPT2", GPT2 | {"activation_function": "relu"}),
    "gpt2 erf": ("GPT2", GPT2 | {"activation_function": "gelu"}),
    "gpt2 cross": ("GPT2", GPT2 | {"add_cross_attention": True}),
    "llama gelu": ("Llama", LLAMA | {"hidden_act": "gelu"}),
    "llama dynamic rope": (
        "Llama",
        LLAMA | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "mistral window": ("Mistral", LLAMA | {"sliding_window": 8}),
    "qwen2 windows": (
        "Qwen2",
        LLAMA | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 16}),
    "olmo2": ("Olmo2", LLAMA),
    "gemma2": ("Gemma2", LLAMA | {"head_dim": 16}),
    "cohere": ("Cohere", LLAMA),
    "granite": ("Granite", LLAMA),
    "phi": ("Phi", LLAMA),
}


def tiny(family: str, options: dict[str, object], dtype: str = "float32"):
    """A random model whose biases and norm weights are random too."""
    torch.manual_seed(7)
    config = getattr(transformers, f"{family}Config")(**options)
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    return model.to(getattr(torch, dtype)).to(DEVICE)


class Attention:
    """Every step's keys and values, one query a row; rotates as Llama does."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.held, self.position = decoder, {}, 0

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        d = self.decoder
        assert qkv.shape[1] == (d.num_q_heads + 2 * d.num_kv_heads) * d.head_dim
        heads = qkv.view(qkv.shape[0], -1, 1, d.head_dim)
        query, key, value = heads.split([d.num_q_heads, d.num_kv_heads, d.num_kv_heads], 1)
        if d.rotary is not None:
            cos, sin = (table[self.position] for table in d.rotary)
            query, key = (x * cos + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * sin for x in (query, key))
        if layer in self.held:
            key, value = (torch.cat(pair, 2) for pair in zip(self.held[layer], (key, value), strict=True))
        self.held[layer] = key, value
        key, value = (x.repeat_interleave(d.num_q_heads // d.num_kv_heads, 1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=d.scale)
        return out.reshape(qkv.shape[0], -1)


@torch.no_grad()
def decode(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, L, V]`` of ``tokens [B, L]``, one step a token."""
    attention, out = Attention(decoder), []
    for position in range(tokens.shape[1]):
        attention.position = position
        positions = torch.full((tokens.shape[0],), position, dtype=torch.int32, device=tokens.device)
        out.append(decoder(tokens[:, position], positions, attention))
    return torch.stack(out, 1)


def some_tokens(rows: int, length: int = 6) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(rows)).to(DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_equals_the_model(name: str) -> None:
    model = tiny(*CASES[name])
    tokens = some_tokens(3, 40)
    wanted = model(tokens).logits
    total = sum(parameter.nbytes for parameter in model.parameters())
    decoder = lean(model)
    assert decoder is not None
    bound = 1e-5 * wanted.abs().max() * (1 if DEVICE == "cpu" else 10)
    assert (decode(decoder, tokens) - wanted).abs().max() <= bound
    assert (model(tokens).logits - wanted).abs().max() <= bound, "the model itself changed"
    weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
    assert sum(weights.values()) == total, "a second copy of weights"
    assert {t.untyped_storage().data_ptr() for t in tensors(decoder)} <= set(weights)


def tensors(decoder: Decoder) -> list[torch.Tensor]:
    """Every weight that a decoder holds."""
    found = [decoder.table, decoder.head.weight, decoder.final_norm.weight]
    for layer in decoder.layers:
        for part in vars(layer).values():
            found += [t for t in (part.weight, part.bias) if t is not None]
    return found


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_a_second_decoder_shares_the_first_ones_weights(name: str) -> None:
    model = tiny(*CASES[name])
    first, second = (lean(model) for _ in range(2))
    assert first is not None
    assert second is not None
    assert [t.data_ptr() for t in tensors(first)] == [t.data_ptr() for t in tensors(second)]


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3, 17])
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama biases"])
def test_kernels_equal_pytorch(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The narrow launches and the wide ones, in float16 against the same in PyTorch."""
    model = tiny(*CASES[name], dtype="float16")
    decoder = lean(model)
    assert decoder is not None
    if DEVICE == "cpu":  # fewer programs for the interpreter
        monkeypatch.setattr(linear, "multiprocessors", lambda device: 4)
    tokens = some_tokens(rows, 3)
    exact = lean(copy.deepcopy(model).float())
    assert exact is not None
    monkeypatch.setattr(decoders, "runs_kernels", lambda x: False)
    wanted, truth = decode(decoder, tokens), decode(exact, tokens)
    monkeypatch.setattr(decoders, "runs_kernels", lambda x: True)
    got = decode(decoder, tokens)
    assert got.dtype == torch.float16
    allowed = (wanted - truth).norm() / truth.norm()
    assert (got - truth).norm() / truth.norm() <= 2 * allowed + 2e-4
    assert not torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("name", ["gpt2", "llama biases"])
def test_many_rows_go_to_pytorch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the embedding and the norms, from as many rows on as ``product.py`` does not take."""
    monkeypatch.setattr(decoders, "runs_kernels", lambda x: True)
    monkeypatch.setattr(decoders.product, "MAX_ROWS", 2)
    monkeypatch.setattr(linear, "MAX_ROWS", 2)
    test_equals_the_model(name)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_it_does_not_compute(name: str) -> None:
    family, options = REFUSED[name]
    assert lean(tiny(family, options)) is None


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_that_has_had_a_cache_is_lean_still(name: str) -> None:
    """An engine makes a cache first, whose hooks are on the model from then on, and so does the one after it."""
    model = tiny(*CASES[name])
    for compiled in (False, None):
        make_cache(model, "fp32", compiled=compiled)
        assert lean(model) is not None
    for _ in range(2):
        engine = Engine(model, "fp32", batch_size=1, max_seq_len=32)
        assert engine.decoder is not None
    engine.generate([[1, 2, 3]], max_new_tokens=3)
    assert Engine(model, "fp32", batch_size=1, max_seq_len=32, lean=False).decoder is None


def test_refuses_touched_models() -> None:
    model = tiny(*CASES["llama"])
    assert lean(copy.deepcopy(model).train()) is None
    mixed = copy.deepcopy(model)
    mixed.lm_head.half()
    assert lean(mixed) is None
    hooked = copy.deepcopy(model)
    hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert lean(hooked) is None
    replaced = copy.deepcopy(model)
    replaced.model.layers[0].mlp.forward = lambda x: x
    assert lean(replaced) is None

    class Adapter(torch.nn.Linear):
        pass

    adapted = copy.deepcopy(model)
    adapted.model.layers[0].mlp.up_proj.__class__ = Adapter
    assert lean(adapted) is None
    assert lean(model) is not None
