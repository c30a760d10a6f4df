"""Attention whose scores a model changes: learned sink logits and softcaps, against a plain softmax in float64."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

import transformers  # noqa: E402
from hf_mixed import mixed  # noqa: E402

from kvruntime import make_cache  # noqa: E402
from kvruntime.hf.attention import attention  # noqa: E402
from kvruntime.kernels.reference import Scores  # noqa: E402
from kvruntime.methods import changes_scores, make_layer  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Evict, Full, Kivi  # noqa: E402

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


def test_who_changes_scores_where():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for name, method in METHODS.items():
        assert changes_scores(method, cpu)
        assert changes_scores(method, cuda) == (name not in ("kivi", "sink"))


@pytest.mark.parametrize(
    ("family", "what"),
    [
        ("gpt-oss", r"attention sinks \(parameter sinks\)"),
        ("Gemma 2", r"soft-capped attention scores \(config key attn_logit_softcapping = 50.0\)"),
    ],
)
def test_what_no_kernel_attends_to_is_refused_by_name(family, what, monkeypatch):
    model = mixed(family)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    with pytest.raises(ValueError, match=f"has {what}, which kivi-2bit-g32-r128 does not run on cuda$"):
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
