"""Where models come from: directories, the catalogue, the package index."""

import json
import zipfile

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from made_up_pull import pull_of_made_up  # noqa: E402
from runtime_tiny import tiny_directory  # noqa: E402

from kvruntime.checkpoints import load as weights  # noqa: E402
from kvruntime.checkpoints import pull as pulling  # noqa: E402
from kvruntime.checkpoints.load import load, pick_device, resolve  # noqa: E402
from kvruntime.checkpoints.pull import PULLS, cache_dir, convert_gguf, pull, pulled  # noqa: E402


def test_random_weights_are_labelled_and_repeatable():
    source = resolve("gpt2", seed=3)
    if source.real:
        pytest.skip("this machine's hub cache holds GPT-2")
    assert source.weights == "random (seed 3)"
    small = type(source)(**{**vars(source), "config": {**source.config, "n_layer": 1, "vocab_size": 100}})
    before = torch.get_rng_state()
    first, second = (load(small, "cpu").model.state_dict() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = load(type(small)(**{**vars(small), "seed": 4}), "cpu").model.state_dict()
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("falcon-40b", "FalconForCausalLM is not supported: it does not go through transformers' attention interface"),
        ("gpt2", r"^gpt2: 0\.5 GiB of float32 weights do not fit into the 0\.1 GiB that are free on cpu$"),
    ],
)
def test_what_cannot_run_is_refused_before_any_weight_is_made(name, message, monkeypatch):
    monkeypatch.setattr(weights, "_free_nbytes", lambda device: 100 << 20)
    with pytest.raises(ValueError, match=message):
        weights.load(weights.resolve(name), "cpu")


def test_a_directory(tmp_path):
    folder = tiny_directory(tmp_path / "tiny")
    source = resolve(str(folder))
    assert (source.weights, source.real) == ("directory tiny", True)
    loaded = load(source, "cpu", "bfloat16")
    assert (loaded.dtype, loaded.max_positions, loaded.vocab_size) == ("bfloat16", 256, 128)
    assert loaded.tokenizer("ab")["input_ids"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        resolve(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        resolve(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        resolve(str(folder))


def test_unsupported_architecture(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing-known"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="unsupported architecture"):
        load(resolve(str(tmp_path)), "cpu")


def test_names_that_mean_nothing(monkeypatch, tmp_path):
    with pytest.raises(LookupError, match="gpt2-large"):
        resolve("gpt2-larg")
    monkeypatch.setenv("KVRUNTIME_CACHE", str(tmp_path))
    with pytest.raises(LookupError, match="kvruntime pull smollm2-135m"):
        resolve("smollm2-135m", offline=True)
    with pytest.raises(OSError, match="--offline forbids"):
        resolve("nobody/nothing-like-this", offline=True)
    with pytest.raises(LookupError, match="allowed are smollm2-135m"):
        pull("nothing")
    with pytest.raises(ValueError, match="allowed here are cpu"):
        pick_device("tpu")


def test_a_device_without_an_index(monkeypatch):
    """``load(source, "cuda")`` is on the first card."""
    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(weights, "_random", lambda source, device, kind: asked.append((device, kind)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load(resolve("llama-3.2-1b"), "cuda")
    assert asked == [("cuda:0", torch.float16)]


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    return pull_of_made_up(tmp_path, monkeypatch)


def test_pull_once_checked_and_whole(made_up):
    _, _, downloads = made_up
    folder = pull("made-up", say=lambda line: None)
    assert (folder / "copy.bin").read_bytes() == b"weights" * 1000
    assert pulled("made-up") == folder == pull("made-up") == cache_dir() / "made-up"
    assert len(downloads) == 1
    assert sorted(path.name for path in cache_dir().iterdir()) == ["downloads", "made-up"]
    assert not list((cache_dir() / "downloads").iterdir())


def test_pull_goes_on_after_a_conversion_that_was_cut_off(made_up, monkeypatch):
    spec, _, downloads = made_up

    def cut(files, folder):
        raise KeyboardInterrupt

    monkeypatch.setitem(PULLS, "made-up", type(spec)(**{**vars(spec), "convert": cut}))
    with pytest.raises(KeyboardInterrupt):
        pull("made-up", say=lambda line: None)
    assert pulled("made-up") is None
    assert [path.name for path in cache_dir().iterdir()] == ["downloads"]
    monkeypatch.setitem(PULLS, "made-up", spec)
    pull("made-up", say=lambda line: None)
    assert len(downloads) == 1


def test_pull_refuses_another_file(made_up):
    _, wheel, _ = made_up
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("extra", b"x")
    with pytest.raises(OSError, match="not the pinned"):
        pull("made-up", say=lambda line: None)
    assert pulled("made-up") is None


@pytest.mark.parametrize("harm", ["truncated", "of the same size", "one more", "one less", "unrecorded"])
def test_what_was_pulled_is_hashed_again(made_up, harm):
    said, (_, _, downloads) = [], made_up
    folder = pull("made-up", say=said.append)
    good = (folder / "copy.bin").read_bytes()
    if harm == "truncated":
        (folder / "copy.bin").write_bytes(good[:-1])
    elif harm == "of the same size":
        (folder / "copy.bin").write_bytes(b"W" + good[1:])
    elif harm == "one more":
        (folder / "pytorch_model.bin").write_bytes(b"")
    else:
        (folder / ("copy.bin" if harm == "one less" else "pulled.json")).unlink()
    assert pulled("made-up") is None
    assert "on this machine" in pulling.damage("made-up")
    said.clear()
    assert pull("made-up", say=said.append) == folder == pulled("made-up")
    assert said[0].startswith("made-up is damaged on this machine (")
    assert sorted(path.name for path in folder.iterdir()) == ["copy.bin", "pulled.json"]
    assert (folder / "copy.bin").read_bytes() == good
    assert len(downloads) == 2
    assert sorted(path.name for path in cache_dir().iterdir()) == ["downloads", "made-up"]


def test_something_pulled_that_is_damaged_is_not_ready(made_up, monkeypatch):
    spec = made_up[0]
    monkeypatch.setitem(PULLS, "made-up", type(spec)(**{**vars(spec), "is_model": True}))
    (pull("made-up", say=lambda line: None) / "copy.bin").write_bytes(b"")
    with pytest.raises(LookupError, match=r"is damaged on this machine \(copy.bin has changed\), and --offline"):
        resolve("made-up", offline=True)


def test_a_cached_wheel_of_the_right_size_is_hashed(made_up):
    _, wheel, downloads = made_up
    cached = cache_dir() / "downloads" / wheel.name
    cached.parent.mkdir(parents=True)
    content = wheel.read_bytes()
    cached.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    with pytest.raises(OSError, match="not the pinned"):
        pull("made-up", say=lambda line: None)
    assert pulled("made-up") is None
    assert not cached.exists()
    assert pull("made-up", say=lambda line: None) == pulled("made-up")
    assert len(downloads) == 1


def test_what_a_killed_pull_left_is_removed(made_up):
    """Work folders of before and of now, half a wheel, a directory without its record."""
    _, wheel, _ = made_up
    downloads = cache_dir() / "downloads"
    for left in (cache_dir() / ".made-up-abc/converted", downloads / "tmpabc", downloads / ".made-up-abc"):
        left.mkdir(parents=True)
        (left / "half").write_bytes(b"x")
    (downloads / wheel.name).write_bytes(wheel.read_bytes()[:100])
    (cache_dir() / "made-up").mkdir()
    folder = pull("made-up", say=lambda line: None)
    assert sorted(path.name for path in cache_dir().iterdir()) == ["downloads", "made-up"]
    assert not list(downloads.iterdir())
    assert pulled("made-up") == folder


def test_a_pull_waits_for_another(made_up):
    fcntl = pytest.importorskip("fcntl")
    (cache_dir() / "downloads").mkdir(parents=True)
    said = []
    with pulling._alone(cache_dir() / "downloads", said.append):
        place = pulling.os.open(cache_dir() / "downloads", pulling.os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        pulling.os.close(place)
    assert said == []


def write_gguf(path, state, config, vocabulary, without=""):
    """A small Llama in float32, rows of queries and keys in GGUF's rotary order; ``without`` one of the tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_merges(["a b"])
    for name in ("bos", "eos", "unk"):
        getattr(writer, f"add_{name}_token_id")(0)

    def rotary(weight, heads):
        return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(0, 2, 1, 3).reshape(weight.shape)

    names = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"} | {"self_attn.o_proj": "attn_output"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            if f"blk.{layer}.{theirs}" != without:
                writer.add_tensor(f"blk.{layer}.{theirs}.weight", rotary(weight, heads) if heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_of_a_made_up_gguf(tmp_path):
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    vocabulary = ["<e>", *"abcdefg0123456789", "ab"]
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: tensor.half() for name, tensor in model.state_dict().items()})  # exact in float16
    state = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    source, folder = tmp_path / "m.gguf", tmp_path / "out"
    write_gguf(source, state, config, vocabulary)
    folder.mkdir()
    convert_gguf(source, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("12ab")["input_ids"] == [vocabulary.index(token) for token in ("1", "2", "ab")]
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 5, 9, 3, 17, 2]])
    with torch.inference_mode():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    write_gguf(source, state, config, vocabulary, without="blk.1.attn_k")
    with pytest.raises(ValueError, match=r"weight model\.layers\.1\.self_attn\.k_proj\.weight is missing"):
        convert_gguf(source, folder)


def test_smollm2_as_converted():
    folder = pulled("smollm2-135m")
    if folder is None:
        pytest.skip("smollm2-135m is not in the cache: `kvruntime pull smollm2-135m`")
    loaded = load(resolve("smollm2-135m"), "cpu")
    assert (loaded.model.config.num_hidden_layers, loaded.model.config.num_key_value_heads) == (30, 3)
    assert "dequantized" in loaded.source.weights
    assert loaded.tokenizer("in 123")["input_ids"][-4:] == [216, 33, 34, 35]
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert loaded.tokenizer.decode(loaded.model(ids).logits[0, -1].argmax()) == " Paris"
