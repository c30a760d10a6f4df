"""Large key biases: the one line of ``make_cache``, the layers that ``doctor`` names, bits by layer within a bound."""

import itertools
import json
import warnings
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from runtime_tiny import SIZES, tiny_directory, tiny_model  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from kvruntime import make_cache  # noqa: E402
from kvruntime.bench.quality.doctor import how_stored  # noqa: E402
from kvruntime.cli import run  # noqa: E402
from kvruntime.eval.sensitivity import Proposal, Study, read_back  # noqa: E402
from kvruntime.hf.biases import key_bias_ratios  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Evict, Full, Kivi, make_method  # noqa: E402
from kvsim.methods.layer_mix import mixed  # noqa: E402
from kvsim.specs import parse_method  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
LADDER = (Kivi(nbits=2, residual_length=32), Kivi(nbits=4, residual_length=32), Full("float32"))
PLANTED = 2


def planted(bias: float = 200.0, layers: int = 4) -> Qwen2ForCausalLM:
    """A random Qwen2 of which one layer's key biases are as large as those that Qwen2.5 has."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(**{**SIZES, "num_hidden_layers": layers}, initializer_range=0.1)
        model = Qwen2ForCausalLM(config).eval()
        layer = model.model.layers[PLANTED].self_attn
        layer.k_proj.bias.data = bias * torch.randn_like(layer.k_proj.bias)
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(128, (2, 128), generator=torch.Generator().manual_seed(3))


def test_make_cache_warns_once_of_large_key_biases():
    model = planted()
    ratios = key_bias_ratios(model)
    assert [ratio >= 10 for ratio in ratios] == [False, False, True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_cache(model, "fp16")
        make_cache(model, Evict(inner=Full()))
    with pytest.warns(UserWarning, match="Qwen2ForCausalLM: keys of layer 2 have biases of up to") as caught:
        make_cache(model, Evict(budget=512, sink_length=0, inner=Kivi(nbits=8)))
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_cache(model, "kivi")


@pytest.mark.parametrize("model", [lambda: planted(0.5), tiny_model], ids=["small biases", "none"])
def test_make_cache_says_nothing_of_others(model):
    model = model()
    assert max(key_bias_ratios(model)) < 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_cache(model, "kivi")


def test_the_spread_is_that_of_the_keys_of_normed_inputs():
    """Against keys of random inputs of root mean square 1, the norm's weights included."""
    model = planted()
    layer = model.model.layers[PLANTED]
    layer.input_layernorm.weight.data.uniform_(0.5, 2)
    inputs = torch.nn.functional.rms_norm(torch.randn(4096, 64), (64,)) * layer.input_layernorm.weight
    keys = inputs @ layer.self_attn.k_proj.weight.T
    want = layer.self_attn.k_proj.bias.abs().max() / keys.std(0).median()
    assert key_bias_ratios(model)[PLANTED] == pytest.approx(want.item(), rel=0.05)


def test_weights_that_cannot_be_read_are_passed_over():
    """Packed ones, and those of an offloaded module."""
    model = planted()
    layers = [layer.self_attn.k_proj for layer in model.model.layers]
    layers[0].weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    layers[1].bias = torch.nn.Parameter(torch.empty(64, device="meta"))
    ratios = key_bias_ratios(model)
    assert ratios[:2] == [0, 0]
    assert ratios[PLANTED] > 10
    del layers[PLANTED].weight
    assert key_bias_ratios(model) == [0, 0, 0, 0]


def test_the_planted_layer_is_named_and_given_bits(ids):
    study = Study(planted(), ids, LADDER)
    findings = study.layers()
    assert [finding.index for finding in findings if finding.named] == [PLANTED]
    assert "key biases of" in findings[PLANTED].named
    worst = max(findings, key=lambda finding: finding.errors[0])
    assert worst.index == PLANTED
    assert all(finding.errors[0] > finding.errors[1] > finding.errors[2] == 0 for finding in findings)
    uniform = study.uniform()
    assert [one.kl for one in uniform] == sorted((one.kl for one in uniform), reverse=True)
    assert uniform[-1].kl < 1e-9
    bound = uniform[0].kl / 4
    chosen = study.propose(findings, uniform, bound)
    assert chosen is not None
    assert chosen.kl <= bound
    assert uniform[0].bits < chosen.bits < uniform[-1].bits
    ranks = [study.methods.index(method) for method in chosen.methods]
    assert ranks[PLANTED] == max(ranks) > min(ranks)
    assert chosen.kl == pytest.approx(study.divergence(chosen.methods))
    assert study.propose(findings, uniform, uniform[0].kl) == uniform[0]
    assert Study(study.model, ids, LADDER[:2]).methods == LADDER[:2]
    lossy = Study(study.model, ids, LADDER[:2])
    found = lossy.layers()
    assert lossy.propose(found, lossy.uniform(), 1e-9) is None


def test_the_simulation_is_the_plain_model_without_compression(ids):
    study = Study(tiny_model(), ids, (Full("float32"),))
    study.layers()
    with torch.inference_mode():
        plain = study.model(ids).logits.log_softmax(-1)
    assert torch.allclose(study.exact, plain, atol=1e-4)
    assert study.model.config._attn_implementation == "sdpa"
    assert study.divergence(study.methods * 2) < 1e-9


@pytest.mark.parametrize(
    "method", [Kivi(nbits=2, residual_length=32, sink_length=4), Kivi(nbits=2, residual_length=64)]
)
def test_the_simulation_is_what_decoding_shows(ids, method):
    """The real cache, a token at a time."""
    from kvruntime.hf.cache import argument

    model, few = tiny_model(), ids[:1]
    study = Study(model, few, (replace(method, dtype="float32"),))
    study.layers()
    simulated = study.divergence(study.methods * 2)
    cache = make_cache(model, study.methods[0])
    with torch.inference_mode():
        own = torch.cat([model(few[:, i : i + 1], **argument(cache)).logits for i in range(128)], 1).log_softmax(-1)
    real = torch.nn.functional.kl_div(own, study.exact, reduction="none", log_target=True).sum(-1).mean().item()
    assert simulated == pytest.approx(real, rel=1e-3)
    assert real > 1e-4


def test_a_large_bias_costs_even_at_eight_bits(ids):
    """What the warning is for: the real cache, not the simulation."""
    model = planted(2000.0)
    with torch.inference_mode():
        exact = model(ids).logits.log_softmax(-1)

    def divergence(method):
        with pytest.warns(UserWarning, match="keys of layer") if method.nbits == 8 else warnings.catch_warnings():
            cache = make_cache(model, method)
        from kvruntime.hf.cache import argument

        with torch.inference_mode():
            model(ids[:, :120], **argument(cache))
            own = model(ids[:, 120:], **argument(cache)).logits.log_softmax(-1)
        return torch.nn.functional.kl_div(own, exact[:, 120:], reduction="none", log_target=True).sum(-1).mean().item()

    eight, two = (divergence(Kivi(nbits=bits, residual_length=32, dtype="float32")) for bits in (8, 2))
    assert two > eight > 1e-5


def test_heads_that_are_filled_up_come_back_in_their_size():
    shape = LayerShape(2, 20, 20)
    key, value = (torch.randn(1, 2, 128, 20, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    k, v = read_back(Kivi(nbits=8, residual_length=32), shape, key, value)
    assert k.shape == key.shape
    assert (k - key).abs().max() < 0.05
    assert (v - value).abs().max() < 0.05


def test_runs_of_layers():
    a, b = LADDER[:2]
    assert Proposal((a, a, b, a), 0.0, 0.0).ranges == [(0, 1, a), (2, 2, b), (3, 3, a)]


def test_a_mean_of_bits_goes_where_it_saves_most(ids):
    """None of the choices of as many bits has less error, where single layers' errors add up."""
    study = Study(planted(), ids, LADDER[:2])
    study.layers()
    alone = [study.layer_alone(layer) for layer in range(4)]
    few, more = (one.bits for one in study.uniform())
    chosen = study.propose_within(alone, few + (more - few) * 0.6)
    assert chosen.bits == pytest.approx(few + (more - few) / 2)
    assert chosen.methods.count(LADDER[1]) == 2
    assert chosen.kl == study.divergence(chosen.methods)
    sums = [sum(alone[i][i in raised] for i in range(4)) for raised in itertools.combinations(range(4), 2)]
    assert sum(of[LADDER.index(one)] for of, one in zip(alone, chosen.methods, strict=True)) == pytest.approx(min(sums))
    assert study.propose_within(alone, few).methods == (LADDER[0],) * 4
    with pytest.raises(ValueError, match=r"bits 1: allowed are 3\.000 and above, those of kivi-2bit-g32-r32"):
        study.propose_within(alone, 1.0)


def test_a_proposal_is_printed_as_a_method():
    a, b = LADDER[:2]
    proposal = Proposal((a, b, a), 0.0, 0.0)
    mix = "mix:first=0,last=0,exact=(kivi:nbits=4,residual_length=32),inner=(kivi:residual_length=32),layers=1"
    assert how_stored(proposal.method, (), 0.05, None) == f"as a method: {mix}"
    coded = [make_method(name) for name in ("int8", "int4", "int4")]
    assert how_stored(mixed(coded), (), 0.05, None) == (
        "as a method: mix:first=0,last=0,exact=(int8),inner=(int4),layers=0"
    )


@pytest.mark.parametrize(("bits", "name"), [(None, "kivi-4bit-g32-r32"), (8.5, "int8"), (6.0, "kivi-4bit-g32-r32")])
def test_what_no_cache_stores_names_the_method_next_to_it(bits, name):
    """Within a bound that of the fewest bits, within a mean of bits that of the least divergence."""
    a, b = LADDER[:2]
    eight = make_method("int8")
    uniform = [Proposal((a,) * 3, 0.4, 3.0), Proposal((b,) * 3, 0.04, 5.0), Proposal((eight,) * 3, 0.001, 8.5)]
    said = how_stored(mixed((a, eight, a)), uniform, 0.05, bits)
    assert "mixes one kind of method" in said
    assert said.endswith(
        f": take {name} for all layers, the {'least divergence' if bits else 'fewest bits'} of those within"
    )


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("0", "numbers above 0"), ("-1", "numbers above 0"), ("inf", "finite numbers"), ("nan", "finite numbers")],
)
@pytest.mark.parametrize("option", ["bound", "bits"])
def test_limits_are_finite_and_above_zero(option, text, allowed, capsys):
    """Said before a model is looked for."""
    assert run(["doctor", "--model", "nowhere", "--offline", f"--{option}", text]) == 2
    said = capsys.readouterr().err
    assert f"{option} {text}: allowed are {allowed}" in said
    assert said.count("\n") == 1


def test_no_more_bits_than_a_plain_cache_has(capsys):
    assert run(["doctor", "--model", "nowhere", "--offline", "--bits", "99"]) == 2
    assert "bits 99: allowed are numbers above 0, and no more than the 16 of a plain cache" in capsys.readouterr().err


def test_too_few_bits_are_refused_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    tiny_directory(tmp_path)
    monkeypatch.setattr(Study, "layers", lambda study: pytest.fail("measured"))
    assert run(["doctor", "--model", str(tmp_path), "--offline", "--device", "cpu", "--bits", "1"]) == 2
    assert "bits 1: allowed are 3.000 and above, those of kivi-k2+2v2-rotv-g64-r128-s4" in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    tiny_directory(tmp_path)
    planted().save_pretrained(tmp_path)
    words = [
        "doctor",
        "--model",
        str(tmp_path),
        "--offline",
        "--device",
        "cpu",
        "--tokens",
        "200",
        "--residual-length",
        "32",
    ]
    assert run([*words, "--nbits", "2", "--nbits", "8", "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert found["methods"] == ["kivi-2bit-g32-r32", "kivi-8bit-g32-r32", "fp16"]
    assert [layer["layer"] for layer in found["layers"] if layer["named"]] == [PLANTED]
    assert found["proposal"]["kl"] <= found["bound"] == 0.05
    assert run([*words, "--nbits", "2", "--nbits", "8", "--bits", "6.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["methods"] == ["kivi-2bit-g32-r32", "kivi-8bit-g32-r32"]
    assert found["proposal"]["bits"] <= found["mean_bits"] == 6.5
    assert parse_method(found["proposal"]["spec"], {}).name.startswith("mix-l")
    assert run([*words, "--nbits", "2", "--bound", "1e-4"]) == 0
    shown = capsys.readouterr().out
    assert f"layer {PLANTED}: key biases of" in shown
    assert "as decoding one token at a time stores it" in shown
    broken = planted()
    with torch.no_grad():
        broken.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path)
    for form in ([], ["--json"]):
        assert run([*words, "--nbits", "2", *form]) == 2
        shown = capsys.readouterr()
        assert "is nan: the weights, or what was computed with them, overflowed" in shown.err
        assert not shown.out
