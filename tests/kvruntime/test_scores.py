"""Attention whose scores a model changes: learned sink logits and softcaps, against a plain softmax in float64."""

from __future__ import annotations

import re

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

import transformers  # noqa: E402
from hf_mixed import MIXED, mixed  # noqa: E402
from hf_models import DEVICE  # noqa: E402
from hf_models import prompt as prompt_of  # noqa: E402

from kvruntime import make_cache  # noqa: E402
from kvruntime.hf import empty  # noqa: E402
from kvruntime.hf.attention import attention  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402
from kvruntime.hf.stepped import SteppedCache  # noqa: E402
from kvruntime.kernels import prompt  # noqa: E402
from kvruntime.kernels.reference import Scores  # noqa: E402
from kvruntime.methods import changes_scores, make_layer  # noqa: E402
from kvruntime.methods.full import decode  # noqa: E402
from kvruntime.methods.full import reference as full_reference  # noqa: E402
from kvruntime.methods.kivi import attention as attention_kernel  # noqa: E402
from kvruntime.methods.kivi import reference  # noqa: E402
from kvruntime.methods.kivi.cache import KiviLayer  # noqa: E402
from kvruntime.methods.rows import Rows  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Evict, Full, Kivi, kivi_boost, kivi_seed  # noqa: E402

HEADS, Q_HEADS, DIM, VALUE_DIM = 2, 6, 32, 48
METHODS = {
    "full": Full("float32"),
    "half": Full("float16"),
    "kivi": Kivi(nbits=4, group_size=16, residual_length=32, value_group_size=16, dtype="float32"),
    "sink": Kivi(nbits=2, residual_length=32, sink_length=5, value_group_size=16, dtype="float32"),
    "evict": Evict(budget=128, sink_length=0, inner=Full("float32")),
}
CHANGES = {"sinks": (None, True), "softcap": (2.0, False), "both": (2.0, True)}


def plain64(query, key, value, scale, softcap, sinks):
    """Softmax in float64: ``query [num_q_heads, L, dim]`` sees all tokens but the newer of the last L."""
    group, length, held = query.shape[0] // key.shape[0], query.shape[1], key.shape[1]
    key, value = (x.double().repeat_interleave(group, 0) for x in (key, value))
    score = query.double() @ key.transpose(1, 2) * scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    at = torch.arange(held)
    score = score.masked_fill(at > at[held - length :, None], float("-inf"))
    if sinks is not None:
        score = torch.cat([score, sinks.double()[:, None, None].expand(-1, length, 1)], 2)
        value = torch.cat([value, torch.zeros_like(value[:, :1])], 1)
    return score.softmax(-1) @ value


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", METHODS)
def test_attend_is_a_softmax_over_what_is_stored(name, change):
    """Ragged rows; one query over the stored tokens, and several with fresh tokens, some of them padding."""
    torch.manual_seed(0)
    layer = make_layer(METHODS[name], LayerShape(HEADS, DIM, VALUE_DIM), 2, None, torch.device("cpu"))
    softcap, has_sinks = CHANGES[change]
    sinks = 5 + 2 * torch.randn(Q_HEADS) if has_sinks else None
    scores = Scores(softcap, sinks)
    layer.append(torch.randn(2, HEADS, 100, DIM), torch.randn(2, HEADS, 100, VALUE_DIM), [100, 61])
    query = 3 * torch.randn(2, Q_HEADS, 1, DIM)
    got = layer.attend(query, 0.2, scores=scores)
    for row in range(2):
        want = plain64(query[row], *layer.tokens(row), 0.2, softcap, sinks)
        torch.testing.assert_close(got[row].double(), want, atol=1e-5, rtol=1e-4)
        assert (layer.attend(query, 0.2)[row].double() - want).abs().max() > 1e-2
    query, key, value = 3 * torch.randn(2, Q_HEADS, 7, DIM), torch.randn(2, HEADS, 7, DIM), torch.randn(2, HEADS, 7, 48)
    got = layer.attend(query, 0.2, (key, value, [7, 4]), scores=scores)
    for row, count in enumerate((7, 4)):
        held = [
            torch.cat([x, new[row, :, 7 - count :]], 1) for x, new in zip(layer.tokens(row), (key, value), strict=True)
        ]
        want = plain64(query[row, :, 7 - count :], *held, 0.2, softcap, sinks)
        torch.testing.assert_close(got[row, :, 7 - count :].double(), want, atol=1e-5, rtol=1e-4)
    assert not got[1, :, :3].any()


KERNELS = {
    "2-bit": Kivi(nbits=2, residual_length=64, sink_length=3, dtype="float16"),
    "3-bit": Kivi(nbits=3, residual_length=64, dtype="float32"),
    "boost": kivi_boost(residual_length=64),
    "seed": kivi_seed(),
}


def filled(method, lengths):
    """Rows of ``lengths`` tokens as a layer on the CPU stores them, then on the device that has the kernels."""
    shape = LayerShape(HEADS, 64, 64)
    layer = make_layer(method, shape, len(lengths), None, torch.device("cpu"))
    layer.append(torch.randn(3, HEADS, 150, 64), torch.randn(3, HEADS, 150, 64), lengths)
    return layer


@pytest.mark.parametrize(
    ("name", "change"), [("2-bit", "both"), ("3-bit", "sinks"), ("boost", "both"), ("seed", "softcap")]
)
def test_the_portable_kernel_changes_scores(name, change):
    """As the reference does it: one query a row and several, one split and three, a row that holds nothing."""
    torch.manual_seed(0)
    layer = filled(KERNELS[name], [150, 61, 0])
    for tensor_name, tensor in layer.tensors.items():
        layer.tensors[tensor_name] = tensor.to(DEVICE)
    softcap, has_sinks = CHANGES[change]
    sinks = (5 + 2 * torch.randn(Q_HEADS)).half().to(DEVICE) if has_sinks else None
    scores = Scores(softcap, sinks, 70 if name in ("2-bit", "3-bit") else None)
    for length, splits in ((1, 1), (1, 3), (5, 2)):
        query = (3 * torch.randn(3, Q_HEADS, length, 64)).half().to(DEVICE)
        new = [torch.randn(3, HEADS, length, 64).half().to(DEVICE) for _ in range(2)]
        counts = torch.tensor([5, 2, 1], dtype=torch.int32, device=DEVICE)
        fresh = None if length == 1 else (*new, counts)
        given = layer.stored(), layer.layout, 0.2, fresh
        want = reference.attend(query.float(), *given, scores=scores)
        got = attention_kernel.attend(query, *given, num_splits=splits, scores=scores)
        assert (got.float() - want).norm() <= 2e-3 * want.norm()
        assert (got[2] == 0).all() if length == 1 else not got[2, :, :4].any()


@pytest.mark.parametrize("change", CHANGES)
def test_the_kernel_of_plain_tokens_changes_scores(change):
    """Rows of a decode step, of several queries, and of one line."""
    torch.manual_seed(0)
    softcap, has_sinks = CHANGES[change]
    sinks = 5 + 2 * torch.randn(Q_HEADS) if has_sinks else None
    scores = Scores(softcap, None if sinks is None else sinks.to(DEVICE))
    key, value = torch.randn(3, HEADS, 300, 64), torch.randn(3, HEADS, 300, 64)
    lengths, counts = [300, 61, 0], [5, 2, 1]
    held = torch.tensor(lengths, dtype=torch.int32)
    plain = full_reference.Stored(*(x.to(DEVICE) for x in (key, value, held)))
    query, *new = 3 * torch.randn(3, Q_HEADS, 5, 64), torch.randn(3, HEADS, 5, 64), torch.randn(3, HEADS, 5, 64)
    for length in (1, 5):
        rows = query[:, :, :length].to(DEVICE)
        fresh = None if length == 1 else (*(x.to(DEVICE) for x in new), torch.tensor(counts).int().to(DEVICE))
        got = decode.attend(rows, plain, 0.2, fresh, scores=scores).cpu()
        for row, count in enumerate([1] * 3 if length == 1 else counts):
            tokens = [x[row, :, : lengths[row]] for x in (key, value)]
            if length > 1:
                tokens = [torch.cat([x, y[row, :, 5 - count :]], 1) for x, y in zip(tokens, new, strict=True)]
            if not tokens[0].shape[1]:
                assert not got[row].any()
                continue
            want = plain64(query[row, :, length - count : length], *tokens, 0.2, softcap, sinks)
            torch.testing.assert_close(got[row, :, length - count :].double(), want, atol=1e-5, rtol=1e-4)
            assert not got[row, :, : length - count].any()


@pytest.mark.parametrize("length", [1, 7])
def test_windows_and_prompts_attend_in_blocks_of_queries(length, monkeypatch):
    """Tensors that are no packed layer's, with a mask and without."""
    monkeypatch.setattr("kvruntime.hf.attention.SCORE_BLOCK", 2 * Q_HEADS * 20 * 3)
    torch.manual_seed(0)
    query, sinks = torch.randn(2, Q_HEADS, length, DIM), torch.randn(Q_HEADS)
    key, value = torch.randn(2, HEADS, 20, DIM), torch.randn(2, HEADS, 20, VALUE_DIM)
    at = torch.arange(20)
    causal = (at <= at[20 - length :, None])[None, None]
    for mask in (None, causal, torch.where(causal, 0.0, float("-inf"))):
        got, _ = attention(torch.nn.Module(), query, key, value, mask, scaling=0.3, softcap=2.0, s_aux=sinks)
        assert got.shape == (2, length, Q_HEADS, VALUE_DIM)
        for row in range(2):
            want = plain64(query[row], key[row], value[row], 0.3, 2.0, sinks)
            torch.testing.assert_close(got[row].transpose(0, 1).double(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [1, 40])
def test_the_kernel_of_prompts(length, masked):
    """Keys of before them too, ragged rows, a window, queries that see nothing, heads of two dimensions."""
    torch.manual_seed(0)
    columns = length + 90 * masked
    query, sinks = 3 * torch.randn(2, Q_HEADS, length, DIM), torch.randn(Q_HEADS)
    key, value = torch.randn(2, HEADS, columns, DIM), torch.randn(2, HEADS, columns, VALUE_DIM)
    at = torch.arange(columns)
    own = at[columns - length :, None]
    seen = (at <= own).expand(2, 1, -1, -1).clone()
    if masked:
        seen[0] &= at > own - 16
        seen[1] &= at >= 110
        key[0, :, :20] = 1e4  # what nobody sees
    given = [x.to(DEVICE) for x in (query, key, value)]
    got = prompt.attend(*given, seen.to(DEVICE) if masked else None, 0.2, Scores(2.0, sinks.to(DEVICE))).cpu()
    assert got.shape == (2, length, Q_HEADS, VALUE_DIM)
    for row in range(2):
        k, v = (x[row].double().repeat_interleave(Q_HEADS // HEADS, 0) for x in (key, value))
        score = 2 * torch.tanh(0.2 * query[row].double() @ k.transpose(1, 2) / 2)
        score = score.masked_fill(~seen[row], float("-inf"))
        score = torch.cat([score, sinks.double()[:, None, None].expand(-1, length, 1)], 2).softmax(-1)
        want = score[..., :-1] @ v
        torch.testing.assert_close(got[row].transpose(0, 1).double(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt-oss", "Gemma 2"])
def test_a_step_on_the_device_changes_scores(family, monkeypatch):
    """A model whose layers are all full attention: each step is one that a graph could hold."""
    monkeypatch.setattr(empty, "steps_on", lambda device: True)
    name, arguments, *_ = MIXED[family]
    config = getattr(transformers, name)(**arguments | {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2})
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(DEVICE)
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(weight)
    model.generation_config.eos_token_id = None
    inputs, out = prompt_of(2, 30, (0, 5)), []
    for compiled in (None, False):
        cache = make_cache(model, "kivi", nbits=8, residual_length=32, compiled=compiled)
        assert isinstance(cache, SteppedCache) == (compiled is None)
        out.append(model.generate(**inputs, **argument(cache), max_new_tokens=12, do_sample=False, pad_token_id=0))
    assert torch.equal(*out)
    with pytest.raises(ValueError, match="which a compiled cache does not run"):
        make_cache(model, compiled=True, max_seq_len=64)


def test_every_method_changes_scores_everywhere():
    for method in METHODS.values():
        assert all(changes_scores(method, torch.device(device)) for device in ("cpu", "cuda"))


@pytest.mark.parametrize(
    ("family", "what"),
    [
        ("gpt-oss", "attention sinks (parameter sinks)"),
        ("Gemma 2", "soft-capped attention scores (config key attn_logit_softcapping = 50.0)"),
    ],
)
def test_what_no_kernel_attends_to_is_refused_by_name(family, what, monkeypatch):
    """A method whose layers do not say that they take scores."""
    model = mixed(family)
    monkeypatch.setattr(KiviLayer, "changes_scores", Rows.changes_scores)
    with pytest.raises(
        ValueError, match=f"has {re.escape(what)}, which kivi-2bit-g32-r128 does not run on {model.device.type}$"
    ):
        make_cache(model)
    make_cache(model, "fp16")


def test_sinks_that_a_model_applies_by_itself_are_refused():
    class OwnAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.sinks = torch.nn.Parameter(torch.zeros(4))

    config = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    model = transformers.LlamaForCausalLM(config)
    model.model.layers[0].extra = OwnAttention()
    with pytest.raises(ValueError, match="attention sinks that OwnAttention applies itself"):
        make_cache(model)
