"""A tiny random Llama, and the same as a directory with a character tokenizer, for tests of the harness."""

import string
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}


def tiny_model() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)).eval()
    model.generation_config.pad_token_id = 0
    return model


def tiny_directory(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {character: index for index, character in enumerate(["?", *sorted(string.printable)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    tiny_model().save_pretrained(folder)
    return folder
