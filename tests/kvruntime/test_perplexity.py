"""Perplexity through the cache, the text it is measured on, and the study of axes."""

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from runtime_tiny import tiny_directory, tiny_model  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from kvruntime import make_cache  # noqa: E402
from kvruntime.eval.axes import LADDER, Axes, simulated_cache  # noqa: E402
from kvruntime.eval.perplexity import perplexity  # noqa: E402
from kvruntime.eval.text import Text, load_text, token_windows  # noqa: E402
from kvruntime.kernels.fake_quantize import CHANNEL, TOKEN, fake_quantize  # noqa: E402
from kvsim.methods import Full, Kivi  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def windows():
    return torch.randint(128, (3, 97), generator=torch.Generator().manual_seed(1))


def plain_nll(model, windows):
    with torch.inference_mode():
        logits = model(windows).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


@pytest.mark.parametrize(("chunk", "batch"), [(1, 3), (16, 2), (96, 1), (1000, 3)])
def test_an_exact_cache_gives_the_plain_forward(model, windows, chunk, batch):
    done = []
    score = perplexity(
        model,
        windows,
        lambda n: make_cache(model, Full("float32"), max_seq_len=n),
        chunk=chunk,
        batch=batch,
        tick=done.append,
    )
    assert score.num_tokens == 3 * 96
    assert score.nll == pytest.approx(plain_nll(model, windows), abs=2e-6)
    assert score.ppl == pytest.approx(math.exp(score.nll))
    assert sum(done) == pytest.approx(1)


def test_a_lossy_cache_differs_and_more_bits_differ_less(model, windows):
    exact = plain_nll(model, windows)
    off = [
        abs(
            perplexity(model, windows, lambda n, m=m: make_cache(model, m, max_seq_len=n), chunk=1, batch=3).nll - exact
        )
        for m in (Kivi(nbits=bits, residual_length=32) for bits in (2, 8))
    ]
    assert off[0] > 10 * off[1] > 0


def test_kivis_axes_simulated_are_the_real_cache(model, windows):
    method = Kivi(nbits=2, residual_length=32, dtype="float32")
    for chunk in (1, 8):
        real = perplexity(model, windows, lambda n: make_cache(model, method, max_seq_len=n), chunk=chunk, batch=3)
        model.set_attn_implementation("sdpa")
        study = perplexity(
            model, windows, lambda n: simulated_cache(model.config, method, Axes(CHANNEL, TOKEN)), chunk=chunk, batch=3
        )
        assert study.nll == pytest.approx(real.nll, abs=1e-5)


def test_the_ladder_of_axes_on_outlier_channels():
    """Keys with a few large channels, values without: the published shape of real caches, and KIVI's axes win."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(4, 256, 64, generator=generator) for _ in range(3))
    key[..., ::16] = 8 + 3 * key[..., ::16]
    value *= torch.rand(4, 256, 1, generator=generator) * 3  # tokens of different size

    def attend(k, v):
        return torch.nn.functional.scaled_dot_product_attention(query, k, v)

    exact = attend(key, value)

    def off(pair):
        k, v = (fake_quantize(x, 2, 32, axis) for x, axis in zip((key, value), pair, strict=True))
        return (attend(k, v) - exact).norm().item()

    right, keys_wrong, values_wrong, both_wrong = (off(pair) for pair in LADDER.values() if pair)
    assert right < min(keys_wrong, values_wrong)
    assert max(keys_wrong, values_wrong) < both_wrong


def test_fake_quantization_by_hand():
    x = torch.tensor([[0.0, 10.0], [1.0, 20.0], [2.0, 30.0], [3.0, 40.0]])  # [tokens, channels]
    assert torch.equal(fake_quantize(x, 2, 4, CHANNEL), x)  # four levels each
    assert fake_quantize(x, 1, 2, TOKEN).tolist() == x.tolist()
    assert fake_quantize(x, 1, 4, CHANNEL)[:, 0].tolist() == [0, 0, 3, 3]
    with pytest.raises(ValueError, match="group size 3 does not divide 2 channels"):
        fake_quantize(x, 2, 3, TOKEN)


def test_text(tmp_path):
    default = load_text()
    assert len(default.content) > 300_000
    assert len(default.sha256) == 64
    file = tmp_path / "t.txt"
    file.write_text("a" * 100)
    assert load_text(file).name == "t.txt"
    for content, message in ((b" \n", "is empty"), (b"abc\xff", "not UTF-8")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_text(file)
    with pytest.raises(ValueError, match="cannot read"):
        load_text(tmp_path / "none")


def test_windows(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_directory(tmp_path))
    text = Text("t", "abcdefghij" * 10)
    ids = token_windows(tokenizer, text, 30)
    assert ids.shape == (3, 30)  # the tail of 10 is left out
    assert len(ids.unique()) == 10
    assert token_windows(tokenizer, text, 30, 61).shape == (2, 30)
    assert token_windows(tokenizer, text, 500).shape == (1, 100)
    with pytest.raises(ValueError, match="window 1"):
        token_windows(tokenizer, text, 1)
    with pytest.raises(ValueError, match="1 tokens"):
        token_windows(tokenizer, Text("t", "a"), 10)
