"""Models and options that cannot be run right are refused at make_cache, each by the name of the reason."""

from __future__ import annotations

import copy
import re
from inspect import signature

import pytest
import torch
import transformers
from hf_models import DEVICE, GQA, tiny
from hf_refused import REFUSED, refused
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from kvruntime import make_cache
from kvruntime.hf.attention import REFUSED as REFUSED_ARGUMENTS
from kvruntime.hf.cache import Cache, argument
from kvruntime.methods import LAYERS
from kvsim.engines.kvruntime import names
from kvsim.methods import METHODS, Full, Kivi


@pytest.mark.parametrize("reason", REFUSED)
def test_models_are_refused_by_name(reason):
    model, said = refused(reason)
    assert re.search(REFUSED[reason][2], said)
    assert "\n" not in said
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_encoder_decoders_are_refused():
    config = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="an encoder-decoder"):
        make_cache(transformers.T5ForConditionalGeneration(config))


def test_encoders_are_refused():
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="BertForMaskedLM is not supported: an encoder, whose layers attend without"):
        make_cache(transformers.BertForMaskedLM(config))
    config.is_decoder = True
    assert make_cache(transformers.BertLMHeadModel(config)).get_seq_length() == 0


def test_models_with_a_past_of_their_own_are_refused():
    rwkv = transformers.RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(ValueError, match="RwkvForCausalLM is not supported: it has no attention"):
        make_cache(transformers.RwkvForCausalLM(rwkv))
    minimax = transformers.MiniMaxConfig(**{**GQA, "num_local_experts": 2, "layer_types": ["full_attention"] * 2})
    with pytest.raises(ValueError, match="it takes a cache of its own alone, MiniMaxCache"):
        make_cache(transformers.MiniMaxForCausalLM(minimax))


def attend(module, query, key, value, mask, given):
    function = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    return function(module, query, key, value, mask, dropout=0.0, scaling=module.scaling, **given)


class OwnAttention(modeling_llama.LlamaAttention):
    """As a model's own code may have it: work on keys and values only without a cache, and a function that attends."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **given):
        past = next((given.pop(name) for name in ("cache", "past_key_values") if name in given), None)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        states = (part(hidden_states).view(shape).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = states
        query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past is not None:
            key, value = past.update(key, value, self.layer_idx)
        else:
            key, value = key.contiguous(), value[:]
        if self.config._attn_implementation == "eager":
            raise AssertionError(key.mean())
        out, weights = attend(self, query, key, value, attention_mask, given)
        key, value = out.flatten(2), weights
        return self.o_proj(key.contiguous()), value


def test_layers_that_hand_on_in_their_own_way_run():
    model, ids = copy.deepcopy(tiny("Llama")), torch.arange(8, device=DEVICE)[None]
    want = model.generate(ids, max_new_tokens=4, do_sample=False)
    for layer in model.model.layers:
        layer.self_attn.__class__ = OwnAttention
    cache = make_cache(model, "fp32")
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, **argument(cache)), want)


def test_layers_of_cross_attention_are_named():
    """By a config key where it lists them, as Llama 3.2 Vision's does, else by the module that is one."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = transformers.models.mllama.MllamaTextConfig(
        **{**GQA, "cross_attention_layers": [1], "rope_parameters": rope}
    )
    model = transformers.models.mllama.modeling_mllama.MllamaForCausalLM(text)
    with pytest.raises(ValueError, match=r"cross-attention \(config key cross_attention_layers = \[1\]\)$"):
        make_cache(model)
    text.cross_attention_layers = None
    with pytest.raises(ValueError, match=r"cross-attention \(module model\.layers\.1\)$"):
        make_cache(model)


@pytest.mark.parametrize("name", sorted(REFUSED_ARGUMENTS))
def test_what_would_change_the_scores_is_refused_where_a_layer_attends(name):
    """The second line of defence, for a model whose config did not say so."""
    model, ids = copy.deepcopy(tiny("Llama")), torch.arange(8, device=DEVICE)[None]
    attend, cache = model.model.layers[1].self_attn.forward, make_cache(model)
    model.model.layers[1].self_attn.forward = lambda *args, **more: attend(*args, **more, **{name: torch.ones(1)})
    with torch.no_grad(), pytest.raises(ValueError, match=f"LlamaAttention attends with {name}, which a kvruntime"):
        model(ids, **argument(cache))


NEVER_APPLIES = {
    "Phi-4-mini": ("Phi3Config", {**GQA, "sliding_window": 1024}),
    "as long as the positions": ("MistralConfig", {**GQA, "sliding_window": 512}),
    "switched off": ("Qwen2Config", {**GQA, "use_sliding_window": False, "sliding_window": 64}),
    "of no layer": (
        "Qwen2Config",
        {**GQA, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
    ),
    "of layers with an embedding of their own": ("Gemma3TextConfig", {**GQA, "head_dim": 32, "sliding_window": 600}),
    "of long layers": (
        "Qwen2Config",
        {**GQA, "use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1},
    ),
}


@pytest.mark.parametrize("case", NEVER_APPLIES)
def test_a_window_that_no_token_leaves_is_full_attention(case):
    """As kvsim counts it; the tokens are stock's."""
    config_class, arguments = NEVER_APPLIES[case]
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**arguments)).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(2, 97, (2, 40))
    stock = model.generate(ids, max_new_tokens=5, do_sample=False)
    for options in ({}, {"compiled": True, "max_seq_len": 64}):
        cache = make_cache(model, "fp32", **options)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, **argument(cache)), stock)


def test_a_window_is_noticed_where_a_layer_attends_too():
    """The second line of defence, for a model whose config did not say so; and rows that outgrow a long window."""
    model = copy.deepcopy(tiny("Mistral"))
    ids = torch.arange(40, device=DEVICE)[None]
    make_cache(model)
    for window, positions, fails in ((64, 512, True), (None, 512, False), (512, 512, False), (39, 30, True)):
        for module in model.modules():
            if hasattr(module, "sliding_window"):
                module.sliding_window = window
        model.config.sliding_window, model.config.max_position_embeddings = None, positions
        model.model.layers[0].self_attn.config.sliding_window = window
        cache = make_cache(model) if not fails else Cache(Kivi(), 2)
        with torch.no_grad():
            if fails:
                with pytest.raises(ValueError, match=rf"attends to 40 tokens with sliding_window {window}, which"):
                    model(ids, **argument(cache))
            else:
                assert model(ids, **argument(cache)).logits.isfinite().all()


def test_tensor_parallel_ranks(monkeypatch):
    """transformers leaves GPT-2 whole on every rank without a word, and fails obscurely where heads do not divide."""
    monkeypatch.setattr(tiny("GPT-2"), "_tp_size", 2, raising=False)
    with pytest.raises(
        ValueError, match="GPT2LMHeadModel is not supported with tp_size 2: it has no tensor-parallel plan"
    ):
        make_cache(tiny("GPT-2"))
    monkeypatch.setattr(tiny("Llama"), "_tp_size", 4, raising=False)
    with pytest.raises(ValueError, match="tp_size 4: it does not divide 2 kv heads"):
        make_cache(tiny("Llama"))


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("kiwi", {}, LookupError, "unknown method 'kiwi': did you mean kivi"),
        ("kivi", {"bits": 2}, ValueError, "'kivi' does not take .*bits"),
        ("kivi", {"nbits": 5}, ValueError, "nbits 5: allowed are"),
        ("kivi", {"value_group_size": 24}, ValueError, "value group size 24 does not divide head dimension 32"),
        ("fp16", {"nbits": 2}, ValueError, "'fp16' does not take nbits"),
        ("kivi", {"max_seq_len": 0}, ValueError, "max_seq_len 0: allowed are 1 and above"),
        ("kivi", {"nbits": 2.0}, ValueError, "nbits 2.0: allowed are 1, 2, 3, 4, 8"),
        ("kivi", {"residual_length": 128.0}, ValueError, "residual_length 128.0: allowed are 0 and above"),
        ("kivi", {"value_group_size": 16.0}, ValueError, "value_group_size 16.0: allowed are 0 and above"),
        ("kivi", {"max_seq_len": 12.5}, ValueError, "max_seq_len 12.5: allowed are whole numbers"),
        (
            "fp8",
            {},
            ValueError,
            "does not run the method fp8: allowed are fp16, bf16, fp32, kivi, kivi-seed, kivi-boost",
        ),
        (None, {}, ValueError, "does not run the method None: allowed are fp16"),
        (Kivi(), {"nbits": 4}, ValueError, "options nbits: allowed with a method's name only"),
    ],
)
def test_bad_options(method, options, error, message):
    with pytest.raises(error, match=message):
        make_cache(tiny("Llama"), method, **options)


@pytest.mark.parametrize("model", [None, "gpt2", torch.nn.Linear(2, 2)], ids=["None", "name", "no language model"])
def test_what_is_no_loaded_model(model):
    with pytest.raises(ValueError, match=r"^model .*: allowed are loaded transformers models"):
        make_cache(model)


def test_a_config_in_place_of_a_model_is_named_by_its_class():
    with pytest.raises(ValueError, match=r"^model a LlamaConfig: allowed are loaded transformers models$"):
        make_cache(tiny("Llama").config)
    with pytest.raises(ValueError, match=r"^model a DataParallel: allowed are loaded transformers models$"):
        make_cache(torch.nn.DataParallel(tiny("Llama")))


def test_the_methods_that_run_are_those_with_a_layer():
    assert {type(METHODS[name]()) for name in names()} == set(LAYERS)
    once = {
        name
        for name, make in METHODS.items()
        if not any(p.default is p.empty for p in signature(make).parameters.values())
    }
    assert {name for name in once if type(METHODS[name]()) in LAYERS} == set(names())


def test_a_cache_of_another_model_is_refused():
    """More layers than it has, or other heads while it holds tokens; reset, it takes other heads."""
    model, ids = tiny("Llama"), torch.arange(40, device=DEVICE)[None]
    wide = copy.deepcopy(model.config)
    wide.num_key_value_heads = 1
    deep = copy.deepcopy(model.config)
    deep.num_hidden_layers, deep.layer_types = 3, None
    with torch.no_grad():
        cache = make_cache(model)
        model(ids, **argument(cache))
        for config, message in (
            (wide, "1 kv heads of 32 for a cache that holds 2 kv heads of 32: reset"),
            (deep, "layer 2 of a model for a cache of 2: make one for this model"),
        ):
            other = type(model)(config).eval().to(DEVICE)
            make_cache(other)
            with pytest.raises(ValueError, match=message):
                other(ids, **argument(cache if config is wide else make_cache(model)))
        cache.reset()
        other = type(model)(wide).eval().to(DEVICE)
        alone = make_cache(other)
        want, have = (other(ids, **argument(one)).logits for one in (alone, cache))
    assert torch.equal(want, have)
    assert cache.nbytes == alone.nbytes


def test_what_the_options_mean():
    model = tiny("Llama")
    assert make_cache(model).method == Kivi(dtype="float32")
    assert make_cache(model, "kivi", nbits=4, dtype="float16").method == Kivi(nbits=4)
    assert make_cache(copy.deepcopy(model).to(torch.bfloat16), "kivi").method == Kivi(dtype="bfloat16")
    assert make_cache(model, "bf16").method == Full("bfloat16")
    assert make_cache(model, Kivi(nbits=8)).method == Kivi(nbits=8)
    cache = make_cache(model, max_seq_len=300)
    assert (cache.nbytes, cache.num_provided, cache.get_seq_length(), cache.get_max_length()) == (0, 0, 0, 300)
    assert repr(cache).startswith("Cache(kivi-2bit-g32-r128, num_layers=2, nbytes=0")
