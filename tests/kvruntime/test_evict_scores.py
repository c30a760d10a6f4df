"""Eviction by scores: every policy against a plain oracle, token by token, and the bytes of what is kept."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

from hf_models import prompt, tiny  # noqa: E402

from kvruntime import load_cache, make_cache, save_cache  # noqa: E402
from kvruntime.bench.harness.weigh import weigh  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402
from kvruntime.hf.models import layer_shapes  # noqa: E402
from kvruntime.methods import make_layer  # noqa: E402
from kvruntime.methods.evict.scores import attention_mass, expected  # noqa: E402
from kvsim.layout import LayerShape, nbytes  # noqa: E402
from kvsim.methods import Evict, Full, Kivi, kivi_boost  # noqa: E402
from kvsim.specs import parse_method  # noqa: E402

CPU = torch.device("cpu")
HEADS, DIM = 2, 8
SHAPE = LayerShape(HEADS, DIM, DIM)
PLAIN = Full("float32")
KIVI = Kivi(8, group_size=16, residual_length=32, sink_length=4, dtype="float32")


def sequence(count: int, batch_size: int = 1, dim: int = DIM, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Query (two heads a kv head), key and value; the first channel of a value tells its token's number."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch_size, 2 * HEADS, count, dim, generator=generator)
    key, value = (torch.randn(batch_size, HEADS, count, dim, generator=generator) for _ in range(2))
    value[..., 0] = torch.arange(count)
    return query, key, value


def numbers(layer, row: int = 0) -> list[list[int]]:
    """Which tokens each head of a row holds, ascending."""
    return [sorted(head[:, 0].round().int().tolist()) for head in layer.tokens(row)[1]]


def feed(layer, tensors: tuple[torch.Tensor, ...], *chunks: int, start: int = 0) -> int:
    """The next tokens, so many at a time."""
    for count in chunks:
        query, key, value = (None if x is None else x[:, :, start : start + count] for x in tensors)
        layer.append(key, value, None, query)
        start += count
    return start


def weights(query: torch.Tensor, key: torch.Tensor, token: int, seen: list[int], head: int) -> dict[int, float]:
    """What ``token``'s queries, mean over a kv head's, give to the tokens ``seen``; plain Python."""
    out = dict.fromkeys(seen, 0.0)
    for q in query[0, 2 * head : 2 * head + 2, token].tolist():
        dots = {t: sum(a * b for a, b in zip(q, key[0, head, t].tolist(), strict=True)) / DIM**0.5 for t in seen}
        total = sum(math.exp(dot) for dot in dots.values())
        for t in seen:
            out[t] += math.exp(dots[t]) / total / 2
    return out


@pytest.mark.parametrize("length", [8, 24], ids=["prompt fits", "prompt does not"])
def test_h2o_accumulates_every_query_and_keeps_the_heaviest(length: int) -> None:
    """H2O of the paper, ``interval=1``: each query's weights over what its head held then, the lightest leaves."""
    method = Evict(budget=14, sink_length=2, inner=PLAIN, policy="h2o", interval=1, recent_length=4)
    query, key, value = sequence(40)
    layer = make_layer(method, SHAPE, 1, None, CPU)
    start = feed(layer, (query, key, value), length)
    mass = [dict.fromkeys(range(length), 0.0) for _ in range(HEADS)]
    for head in range(HEADS):
        for token in range(length):
            for t, w in weights(query, key, token, list(range(token + 1)), head).items():
                mass[head][t] += w
        while len(mass[head]) > 14:
            del mass[head][min((t for t in mass[head] if 2 <= t < length - 4), key=mass[head].__getitem__)]
    assert numbers(layer) == [sorted(held) for held in mass]
    for token in range(length, 40):
        start = feed(layer, (query, key, value), 1, start=start)
        for head, held in enumerate(mass):
            seen = [*held, token]
            for t, w in weights(query, key, token, seen, head).items():
                held[t] = held.get(t, 0.0) + w
            if len(held) > 14:
                old = sorted(held)[
                    2 : len(held) - 1 - 4
                ]  # neither a sink token, nor among the 4 newest before this one
                del held[min(old, key=held.__getitem__)]
        assert numbers(layer) == [sorted(held) for held in mass]
    assert numbers(layer)[0] != numbers(layer)[1]  # a head its own


def test_h2o_scores_by_every_nth_query_and_evicts_as_rarely() -> None:
    method = Evict(budget=20, sink_length=2, inner=PLAIN, policy="h2o", interval=4, recent_length=4)
    tensors = sequence(60)
    layer = make_layer(method, SHAPE, 1, None, CPU)
    start, held, total = feed(layer, tensors, 10), [], []
    for _ in range(50):
        start = feed(layer, tensors, 1, start=start)
        held.append(layer.row_lengths[0])
        total.append(layer.scores.sum().item())
    assert max(held) == 20
    assert set(held[15:]) == {17, 18, 19, 20}
    assert sum(a != b for a, b in pairwise(total)) < 30  # scores change in two steps of four
    with pytest.raises(ValueError, match="came without its queries"):
        feed(layer, (None, *tensors[1:]), 1, 1, 1, 1)


def test_what_a_prompt_chose_stays_while_the_budget_allows() -> None:
    """snapkv: the chosen tokens that score least give way until the newest have their part, then those leave."""
    method = Evict(budget=24, sink_length=2, inner=PLAIN, policy="snapkv", observed=4, kernel_size=1, recent_length=10)
    tensors = sequence(200)
    layer = make_layer(method, SHAPE, 1, None, CPU)
    start = feed(layer, tensors, 60)
    score = attention_mass(tensors[0][0, :, 56:60], tensors[1][0, :, :60])
    ranked = [sorted(range(2, 56), key=lambda t, h=head: -score[h, t].item()) for head in range(HEADS)]
    assert numbers(layer) == [sorted({0, 1, *ranked[h][:18], *range(56, 60)}) for h in range(HEADS)]
    start = feed(layer, tensors, *[1] * 6, start=start)
    assert numbers(layer) == [sorted({0, 1, *ranked[h][:12], *range(56, 66)}) for h in range(HEADS)]
    feed(layer, tensors, *[1] * 134, start=start)
    for head, kept in enumerate(numbers(layer)):
        assert {0, 1, *ranked[head][:11]} <= set(kept)  # 11 of 12 at least: an observed token may outscore the last
        assert set(range(190, 200)) <= set(kept)
        assert len(kept) == 24


def test_a_later_prompt_chooses_among_all_that_is_held() -> None:
    """A second turn's queries find a token of the first turn that its own queries did not look at."""
    method = Evict(budget=24, sink_length=2, inner=PLAIN, policy="snapkv", observed=4, kernel_size=1)
    query, key, value = sequence(60)
    key[:, :, 9] = 0
    layer = make_layer(method, SHAPE, 1, None, CPU)
    start = feed(layer, (query, key, value), 22)
    for head in range(HEADS):
        key[:, head, 9] = layer.tokens(0)[0][head, 9] = 20 * query[0, 2 * head : 2 * head + 2, 56:60].mean((0, 1))
    feed(layer, (query, key, value), 38, start=start)
    assert all(9 in kept and len(kept) == 24 for kept in numbers(layer))


def test_expected_attention_is_that_of_normal_queries() -> None:
    """Against the mean over drawn queries of exp(q k / sqrt(d)), normalised, times the value's length."""
    method = Evict(budget=8, sink_length=2, policy="expected", observed=40)
    query, key, value = (x[0] for x in sequence(60))
    score = expected(method, query, key, value)
    want = torch.zeros_like(score)
    for head in range(4):
        last = query[head, 20:].double()
        covariance = torch.cov(last.T, correction=0)
        drawn = torch.distributions.MultivariateNormal(last.mean(0), covariance)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            queries = drawn.sample((40_000,))
        mean = (queries @ key[head // 2, 2:].double().T / DIM**0.5).exp().mean(0)
        want[head // 2, 2:] += (mean / mean.sum() / 2).float()
    want *= value.norm(dim=-1)
    assert torch.allclose(score, want, rtol=0.1)
    assert not score[:, :2].any()
    layer = make_layer(replace(method, budget=20, inner=PLAIN, recent_length=8), SHAPE, 1, None, CPU)
    layer.append(key[None], value[None], None, query[None])
    best = [set(range(2)) | set(range(52, 60)) | set((2 + score[h, 2:52].topk(10).indices).tolist()) for h in range(2)]
    assert numbers(layer) == [sorted(each) for each in best]


@pytest.mark.parametrize("policy", ["snapkv", "h2o", "expected"])
def test_records_leave_by_their_scores_a_head_its_own(policy: str) -> None:
    """Over packed records: what a head keeps reads back as it was packed, and the blocks that scored least are gone."""
    shape, generator = LayerShape(HEADS, 32, 32), torch.Generator().manual_seed(1)
    method = Evict(budget=132, sink_length=4, inner=KIVI, policy=policy, observed=8, recent_length=0, interval=1)
    query, key, value = sequence(300, dim=32)
    layer, whole = (make_layer(each, shape, 1, None, CPU) for each in (method, KIVI))
    start = feed(layer, (query, key, value), 130)  # fits: 126 tokens after the sink, blocks of 32
    scores = 100 * torch.rand(1, HEADS, layer.scores.shape[2], generator=generator)  # more than three queries add
    layer.scores[:] = scores
    whole.append(key[:, :, :133], value[:, :, :133])
    feed(layer, (query, key, value), 1, 1, 1, start=start)
    for head in range(HEADS):  # of three blocks before the ring's, two may leave
        left = 1 - int(scores[0, head, :2].argmin())
        mine, its = layer.tokens(0)[0][head], whole.tokens(0)[0][head]
        assert mine.shape[0] == 133 - 32
        assert torch.equal(mine[4:36], its[4 + 32 * left : 36 + 32 * left])
        assert torch.equal(mine[36:], its[68:])
    assert layer.attend(torch.randn(1, 4, 1, 32, generator=generator), 1.0).isfinite().all()


def test_tokens_that_leave_together_were_chosen_together() -> None:
    """A prompt over records: the first block holds the tokens that scored least of the chosen, in their order."""
    shape = LayerShape(HEADS, 32, 32)
    method = Evict(budget=132, sink_length=4, inner=KIVI, policy="snapkv", observed=8, kernel_size=1, recent_length=8)
    query, key, value = sequence(400, dim=32)
    layer = make_layer(method, shape, 1, None, CPU)
    start = feed(layer, (query, key, value), 300)
    score = attention_mass(query[0, :, 292:300], key[0, :, :300])
    for head in range(HEADS):
        chosen = sorted(range(4, 292), key=lambda t, h=head: score[h, t].item())[-120:]
        held = layer.tokens(0)[0][head]
        want = key[0, head, sorted(chosen[:32])]
        assert (held[4:36] - want).abs().max() < 0.05  # 8 bits
    feed(layer, (query, key, value), 1, start=start)  # that block leaves
    for head in range(HEADS):
        chosen = sorted(range(4, 292), key=lambda t, h=head: score[h, t].item())[-120:]
        want = key[0, head, sorted(chosen[32:64])]
        assert (layer.tokens(0)[0][head][4:36] - want).abs().max() < 0.05


@pytest.mark.parametrize("chunks", [[100], [60, 60, 60], [68, *[1] * 80], [2, 7, 90]])
@pytest.mark.parametrize("policy", ["recent", "snapkv"])
def test_the_least_budget_over_records(policy: str, chunks: list[int]) -> None:
    """Sink and two blocks, of several records each: no token leaves that is not packed."""
    shape = LayerShape(HEADS, 32, 32)
    method = Evict(budget=68, sink_length=4, inner=KIVI, policy=policy, observed=24)
    tensors = sequence(sum(chunks), dim=32)
    layer = make_layer(method, shape, 1, None, CPU)
    feed(layer, tensors, *chunks)
    held = layer.row_lengths[0]
    assert 36 <= held <= 68
    newest = tensors[1][0, :, -24:]
    assert (layer.tokens(0)[0][:, -24:] - newest).abs().max() < 0.05
    assert layer.attend(tensors[0][:, :, :1], 1.0).isfinite().all()


@pytest.mark.parametrize("policy", ["recent", "snapkv", "h2o", "expected"])
@pytest.mark.parametrize("inner", [PLAIN, KIVI], ids=lambda inner: inner.name)
def test_a_ratio_keeps_a_share_of_what_was_seen(policy: str, inner) -> None:
    """Buffers are those that kvsim says at every length; the storages weigh as much."""
    shape = LayerShape(HEADS, 32, 32)
    method = Evict(ratio=0.25, inner=inner, policy=policy, observed=8)
    tensors = sequence(700, 2, dim=32)
    layer = make_layer(method, shape, 2, None, CPU)
    start = 0
    for count in (500, 1, 1, 90, 100):
        start = feed(layer, tensors, count, start=start)
        assert max(layer.row_lengths) <= method.num_kept(shape, start) == max(method.least, start // 4)
        buffers = {b.name: b.shape for b in method.buffers(shape, 2, layer.num_provided)}
        assert {name: tuple(x.shape) for name, x in layer.tensors.items()} == buffers
        assert weigh(layer) == nbytes(method.buffers(shape, 2, layer.num_provided))
    whole = make_layer(inner, shape, 2, None, CPU)
    feed(whole, tensors, 692)
    assert weigh(layer) < (0.5 if inner is PLAIN else 0.75) * weigh(whole)


@pytest.mark.parametrize("inner", [PLAIN, KIVI], ids=lambda inner: inner.name)
@pytest.mark.parametrize("policy", ["recent", "snapkv", "h2o", "expected"])
def test_rows_choose_alone(policy: str, inner) -> None:
    """Rows of their own lengths in one batch keep what each would keep alone, also once they change places."""
    shape, budget = LayerShape(HEADS, 32, 32), 20 if inner is PLAIN else 100
    method = Evict(budget=budget, inner=inner, policy=policy, observed=8, interval=3)
    tensors, lengths = sequence(260, 3, dim=32), [220, 90, 6]
    layer = make_layer(method, shape, 3, None, CPU)
    query, key, value = (x[:, :, :220] for x in tensors)
    layer.append(key, value, lengths, query)
    for token in range(220, 250):
        query, key, value = (x[:, :, token : token + 1] for x in tensors)
        layer.append(key, value, None, query)
    layer.reorder(torch.tensor([2, 0]))
    for row, place in ((2, 0), (0, 1)):
        alone = make_layer(method, shape, 1, None, CPU)
        feed(alone, tuple(x[row : row + 1] for x in tensors), lengths[row], *[1] * 30, start=220 - lengths[row])
        assert alone.row_lengths[0] == layer.row_lengths[place]
        for mine, its in zip(layer.tokens(place), alone.tokens(0), strict=True):
            assert torch.allclose(mine, its)
        if method.scores:
            blocks = -(-(alone.row_lengths[0] - 4) // method.block)
            assert torch.allclose(layer.scores[place, :, :blocks], alone.scores[0, :, :blocks], atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        Evict(budget=48, policy="h2o"),
        Evict(ratio="25%", policy="expected"),
        Evict(budget=196, inner=KIVI, policy="h2o", observed=16),
        Evict(budget=300, inner=kivi_boost(), policy="snapkv", observed=8),
    ],
    ids=lambda method: method.name,
)
def test_under_generate(method: Evict, tmp_path) -> None:
    """Ragged prompts, then more tokens: bytes as predicted, less than without eviction; saved, loaded, and on."""
    model = tiny("Llama")
    inputs = prompt(3, 330, (0, 60, 250))
    sizes, tokens = {}, {}
    for each in (method, method.inner):
        cache = make_cache(model, each)
        tokens[each] = model.generate(
            **inputs, **argument(cache), max_new_tokens=20, min_new_tokens=20, do_sample=False
        )
        shapes = layer_shapes(model)
        sizes[each] = weigh(cache) - cache.step_nbytes
        assert sizes[each] == cache.nbytes == sum(nbytes(each.buffers(s, 3, cache.num_provided)) for s in shapes)
        if each is method:
            save_cache(cache, tmp_path / "cache")
            again = load_cache(tmp_path / "cache", model)
            assert all(map(torch.equal, again.stores[0].tensors.values(), cache.stores[0].tensors.values()))
            assert again.stores[0].newest == cache.stores[0].newest
            cache.reorder_cache(torch.tensor([2, 2, 0]))
            assert cache.stores[0].seq_lengths == [99, 99, 349]
            assert weigh(cache) - cache.step_nbytes == sizes[each]
    assert sizes[method] < sizes[method.inner]


def test_the_models_own_scale_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries reach the layer such that the root of its channels scales them as the model does."""
    model, seen = tiny("Llama"), []
    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn, "scaling", 0.5)
    cache = make_cache(model, Evict(budget=16, policy="snapkv", observed=4))
    inputs, more = prompt(1, 12), prompt(1, 3)
    with torch.no_grad():
        model(inputs["input_ids"], **argument(cache))
        store = cache.layers[0].store
        append = store.append
        store.append = lambda key, value, lengths, query: (seen.append(query), append(key, value, lengths, query))
        model(more["input_ids"], **argument(cache))
    first = model.model.layers[0]
    hidden = first.input_layernorm(model.model.embed_tokens(more["input_ids"]))
    raw = first.self_attn.q_proj(hidden).view(1, 3, -1, store.shape.key_dim).transpose(1, 2)
    want = raw.norm(dim=-1) * 0.5 * store.shape.key_dim**0.5  # a rotation keeps lengths
    assert torch.allclose(seen[0].norm(dim=-1), want, rtol=1e-3)


def test_specs_compose() -> None:
    method = parse_method("evict:policy=snapkv,inner=kivi-boost", {})
    assert method == Evict(budget=1024, policy="snapkv", inner=kivi_boost())
    assert parse_method("evict:policy=h2o,ratio=25%,inner=(kivi:sink_length=4)", {}).name == (
        "h2o-25%-s4(kivi-2bit-g32-r128-s4)"
    )
    for spec, message in (
        ("evict:ratio=2", "ratio '2': allowed are 0.0001 to 1"),
        ("evict:ratio=25%,budget=9", "budget 9 and ratio 25%: allowed is one of them"),
        ("evict:policy=tova", "policy 'tova': allowed are recent, snapkv, h2o, expected"),
        ("evict:budget=9,recent_length=6", "recent_length 6: allowed are 0 to 5, the budget less the sink"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_method(spec, {})
