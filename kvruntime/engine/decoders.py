"""Which models run by fused kernels instead of their own forward, and how: one decode step, rounded as theirs is.

GPT-2 and the Llama family (Llama, Mistral, Qwen2) are one list of layers here, ``norm, qkv, attention, out, norm, up,
down``, and differ in its norms, biases and activation.  Few rows take one launch a product with all that surrounds it
(``linear.py``); more take tensor cores, and the norms a launch each (``product.py``, ``hopper.py``, ``norm.py``); many
rows, and tensors elsewhere than on a CUDA device, PyTorch.

A decoder holds the model's own weights, no copies: products that are fused here get one tensor, and the model's
parameters become views of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvruntime.engine import hopper, linear, norm, product, reference
from kvruntime.engine.reference import Norm
from kvruntime.hf.attention import is_hooked

Attend = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Linear:
    """``weight [N, K]`` and ``bias [N]``."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Layer:
    """One layer; ``up`` holds the rows of the gate before its own where the activation is gated."""

    attention_norm: Norm
    qkv: Linear
    out: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Decoder:
    """One decode step of a model: tokens to logits, with attention given by the caller."""

    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Linear
    table: Tensor
    position_table: Tensor | None
    activation: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rotary: tuple[Tensor, Tensor] | None
    """Cosines and sines ``[max_positions, head_dim]`` in the model's dtype, as the model computes them."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Logits ``[B, V]`` in the model's dtype after ``tokens [B]`` int64 at ``positions [B]`` int32.

        ``attend(layer, qkv)``: stores the layer's new keys and values and attends; ``qkv [B, (num_q_heads + 2 *
        num_kv_heads) * head_dim]`` without rotary embedding -> ``[B, num_q_heads * head_dim]``.  Nothing here waits
        for the device, so a step may be captured.
        """
        kernels = runs_kernels(self.table)
        embed = norm.embed if kernels else reference.embed
        hidden = embed(tokens, positions, self.table, self.position_table)
        num_rows = tokens.shape[0]
        if not kernels:
            return self._narrow(hidden, attend, reference.linear)
        if num_rows <= few_rows(hidden, self.head.weight):
            return self._narrow(hidden, attend, linear.linear)
        return self._wide(hidden, attend)

    def _narrow(self, hidden: Tensor, attend: Attend, run: Callable[..., Tensor]) -> Tensor:
        """Four launches a layer, each a product with all that surrounds it."""
        for index, layer in enumerate(self.layers):
            qkv = run(hidden, layer.qkv.weight, layer.qkv.bias, norm=layer.attention_norm)
            attended = attend(index, qkv)
            hidden = run(attended, layer.out.weight, layer.out.bias, residual=hidden)
            up = run(hidden, layer.up.weight, layer.up.bias, norm=layer.mlp_norm, activation=self.activation)
            hidden = run(up, layer.down.weight, layer.down.bias, residual=hidden)
        return run(hidden, self.head.weight, self.head.bias, norm=self.final_norm)

    def _wide(self, hidden: Tensor, attend: Attend) -> Tensor:
        """Four products a layer, and after those that add to the residual stream the addition and the next norm."""
        norms = [layer.attention_norm for layer in self.layers] + [self.final_norm]
        _, normalized = norm.add_norm(hidden, None, None, norms[0])
        for index, layer in enumerate(self.layers):
            attended = attend(index, dense(normalized, layer.qkv))
            hidden, normalized = norm.add_norm(hidden, parts(attended, layer.out), layer.out.bias, layer.mlp_norm)
            up = dense(normalized, layer.up, self.activation)
            hidden, normalized = norm.add_norm(hidden, parts(up, layer.down), layer.down.bias, norms[index + 1])
        return dense(normalized, self.head)


def runs_kernels(x: Tensor) -> bool:
    """Whether the Triton kernels take ``x``, or PyTorch."""
    return x.device.type == "cuda"


def few_rows(x: Tensor, weight: Tensor) -> int:
    """Up to how many rows ``linear.py`` is the fastest, by the chains of validation/experiments on an H100."""
    if hopper.supports(x, weight):
        return 1
    return 2 if x.element_size() == 2 else linear.MAX_ROWS


def by_cublas(x: Tensor) -> bool:
    """Many rows; and float32, which ``product.py`` would multiply without tensor cores."""
    return x.shape[0] > product.MAX_ROWS or (x.dtype == torch.float32 and x.device.type == "cuda")


def dense(x: Tensor, layer: Linear, activation: str | None = None) -> Tensor:
    run = reference.linear if by_cublas(x) else product.product
    return run(x, layer.weight, layer.bias, activation=activation)


def parts(x: Tensor, layer: Linear) -> Tensor:
    """The product without its bias, in parts."""
    if by_cublas(x):
        return nn.functional.linear(x, layer.weight).float()[None]
    return product.parts(x, layer.weight)


def lean(model: Any) -> Decoder | None:
    """The fused decoder of ``model``, or None where there is none that computes exactly what its forward does.

    The model stays as it is, but for where its weights lie.  It must be where it is to run, in ``eval`` mode.
    """
    build = BUILDERS.get((type(model).__module__.rpartition(".")[2], type(model).__name__))
    if build is None or not untouched(model):
        return None
    with torch.no_grad():
        return build(model)


def untouched(model: Any) -> bool:
    """Whether all parameters are ordinary tensors of one dtype on one device, and nothing but what ``make_cache`` put
    there hooks into the forward."""
    parameters = list(model.parameters())
    kinds = {(p.dtype, p.device) for p in parameters}
    if (
        model.training
        or len(kinds) != 1
        or any(type(p) is not nn.Parameter or type(p.data) is not Tensor for p in parameters)
    ):
        return False
    ((dtype, device),) = kinds
    if dtype not in (torch.float16, torch.bfloat16, torch.float32) or device.type == "meta":
        return False
    return not any(map(is_hooked, model.modules()))


def are(modules: list[Any], *names: str) -> bool:
    """Whether every module is exactly of a class so named: no adapter, no quantized stand-in."""
    return all(type(module).__name__ in names for module in modules)


def gpt2(model: Any) -> Decoder | None:
    config, body = model.config, model.transformer
    attentions, mlps = [block.attn for block in body.h], [block.mlp for block in body.h]
    norms = [body.ln_f, *(block.ln_1 for block in body.h), *(block.ln_2 for block in body.h)]
    convolutions = [m for a in attentions for m in (a.c_attn, a.c_proj)] + [m for p in mlps for m in (p.c_fc, p.c_proj)]
    plain = (
        are(list(body.h), "GPT2Block")
        and are(attentions, "GPT2Attention")
        and are(mlps, "GPT2MLP")
        and are(convolutions, "Conv1D")
        and are(norms, "LayerNorm")
        and are([body.wte, body.wpe], "Embedding")
        and are([model.lm_head], "Linear")
    )
    scales = {attention.scaling for attention in attentions}
    activations = {type(mlp.act).__name__ for mlp in mlps}
    if not plain or len(scales) != 1 or not activations <= {"NewGELUActivation", "GELUTanh"}:
        return None
    if config.add_cross_attention or any(n.weight is None or n.bias is None for n in norms):
        return None
    layers = tuple(
        Layer(
            Norm(block.ln_1.weight.data, block.ln_1.bias.data, block.ln_1.eps),
            transposed(block.attn.c_attn),
            transposed(block.attn.c_proj),
            Norm(block.ln_2.weight.data, block.ln_2.bias.data, block.ln_2.eps),
            transposed(block.mlp.c_fc),
            transposed(block.mlp.c_proj),
        )
        for block in body.h
    )
    return Decoder(
        layers,
        Norm(body.ln_f.weight.data, body.ln_f.bias.data, body.ln_f.eps),
        stored(model.lm_head),
        body.wte.weight.data,
        body.wpe.weight.data,
        "gelu",
        attentions[0].num_heads,
        attentions[0].num_heads,
        attentions[0].head_dim,
        scales.pop(),
        None,
    )


def llama(model: Any) -> Decoder | None:
    config, body = model.config, model.model
    family = type(model).__name__.removesuffix("ForCausalLM")
    attentions, mlps = [layer.self_attn for layer in body.layers], [layer.mlp for layer in body.layers]
    norms = [body.norm, *(m for x in body.layers for m in (x.input_layernorm, x.post_attention_layernorm))]
    linears = [m for a in attentions for m in (a.q_proj, a.k_proj, a.v_proj, a.o_proj)]
    linears += [m for p in mlps for m in (p.gate_proj, p.up_proj, p.down_proj)]
    plain = (
        are(list(body.layers), f"{family}DecoderLayer")
        and are(attentions, f"{family}Attention")
        and are(mlps, f"{family}MLP")
        and are(norms, f"{family}RMSNorm")
        and are([*linears, model.lm_head], "Linear")
        and are([body.embed_tokens], "Embedding")
        and are([body.rotary_emb], f"{family}RotaryEmbedding")
        and are([mlp.act_fn for mlp in mlps], "SiLUActivation", "SiLU")
    )
    if not plain or len(body.layers) != config.num_hidden_layers:
        return None
    scales = {attention.scaling for attention in attentions}
    windows = {getattr(attention, "sliding_window", None) for attention in attentions}
    if family == "Mistral":
        windows |= {config.sliding_window}
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(scales) != 1 or windows != {None} or not kinds <= {"full_attention"}:
        return None
    head_dim, rotary = attentions[0].head_dim, rotary_tables(body.rotary_emb, config, model.dtype)
    if rotary is None or rotary[0].shape[1] != head_dim:
        return None
    layers = tuple(
        Layer(
            Norm(layer.input_layernorm.weight.data, None, layer.input_layernorm.variance_epsilon),
            fused(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            stored(layer.self_attn.o_proj),
            Norm(layer.post_attention_layernorm.weight.data, None, layer.post_attention_layernorm.variance_epsilon),
            fused(layer.mlp.gate_proj, layer.mlp.up_proj),
            stored(layer.mlp.down_proj),
        )
        for layer in body.layers
    )
    return Decoder(
        layers,
        Norm(body.norm.weight.data, None, body.norm.variance_epsilon),
        stored(model.lm_head),
        body.embed_tokens.weight.data,
        None,
        "silu",
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim,
        scales.pop(),
        rotary,
    )


def rotary_tables(embedding: Any, config: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of every position; None where frequencies depend on the length of the sequence."""
    if embedding.rope_type not in ("default", "linear", "llama3", "yarn"):
        return None
    positions = torch.arange(config.max_position_embeddings, device=embedding.inv_freq.device)
    cos, sin = embedding(torch.empty(0, dtype=dtype, device=positions.device), positions[None])
    return cos[0].contiguous(), sin[0].contiguous()


def stored(module: nn.Linear) -> Linear:
    """A layer's own tensors."""
    if not module.weight.is_contiguous():
        module.weight.data = module.weight.data.contiguous()
    return Linear(module.weight.data, None if module.bias is None else module.bias.data)


def transposed(module: Any) -> Linear:
    """GPT-2 keeps ``[K, N]``: laid out as ``[N, K]``, of which the module sees the transpose."""
    weight = module.weight.data.t().contiguous()
    module.weight.data = weight.t()
    return Linear(weight, module.bias.data)


def fused(*modules: nn.Linear) -> Linear:
    """Several layers of one input as one; their parameters become its rows."""
    weight = stacked([module.weight for module in modules])
    if all(module.bias is None for module in modules):
        return Linear(weight, None)
    missing = [weight.new_zeros(module.weight.shape[0]) for module in modules]
    return Linear(weight, stacked([m.bias if m.bias is not None else z for m, z in zip(modules, missing, strict=True)]))


def stacked(parameters: list[Tensor]) -> Tensor:
    """The parameters one below the other, in a tensor that they become views of, if they are not such already."""
    first, sizes = parameters[0].data, [parameter.shape[0] for parameter in parameters]
    at, adjacent = first.data_ptr(), True
    for parameter in parameters:
        same = parameter.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        adjacent &= same and parameter.is_contiguous() and parameter.data_ptr() == at
        at += parameter.nbytes
    if adjacent:
        return first.as_strided((sum(sizes), *first.shape[1:]), first.stride())
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, rows in zip(parameters, whole.split(sizes), strict=True):
        parameter.data = rows
    return whole


BUILDERS: dict[tuple[str, str], Callable[[Any], Decoder | None]] = {
    ("modeling_gpt2", "GPT2LMHeadModel"): gpt2,
    ("modeling_llama", "LlamaForCausalLM"): llama,
    ("modeling_mistral", "MistralForCausalLM"): llama,
    ("modeling_qwen2", "Qwen2ForCausalLM"): llama,
}
