"""``kvsim estimate``: bytes, what fits on a card, and the time of a token."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvsim.commandline import Command
from kvsim.commands.flags import (
    Chosen,
    batch_option,
    beyond,
    choose_card,
    choose_engine,
    choose_weights,
    engine_option,
    engine_options,
    inputs_object,
    json_option,
    method_options,
    model_option,
    sharding_options,
    show,
    show_json,
    tokens_a_sequence,
)
from kvsim.engines import Engine, Vllm
from kvsim.engines.vllm import Pool
from kvsim.hardware import Hardware
from kvsim.memory.capacity import Room, held_share, largest_batch, largest_context, room
from kvsim.memory.estimate import check_sizes
from kvsim.memory.sharding import Deployment, Sharding, stages
from kvsim.models.load import load_model
from kvsim.output import text
from kvsim.output.schema import envelope, gpu_object, model_object, options_object, row_object
from kvsim.output.text import Times
from kvsim.specs import Value, parse_reserve, parse_size

if TYPE_CHECKING:
    from kvsim.latency.roofline import Constants


@click.command("estimate", cls=Command)
@model_option
@click.option("--ctx", help="Tokens a sequence: 4096, 128k, 1M.  [default: --max-model-len, else 4k]")
@click.option("--max-model-len", help="Longest sequence, as vLLM reads it: 32k is 32000, 32K 32768.")
@click.option("--input-len", help="Tokens of a prompt.")
@click.option("--output-len", help="Tokens generated.")
@batch_option
@method_options
@engine_option
@engine_options
@click.option("--gpu", help="Say what fits beside the weights on this card, and seconds: h100-sxm, h100-sxm:2.")
@click.option(
    "--weight-bits", type=float, help="Bits a weight, of every weight.  [default: the config's dtype, else 16]"
)
@click.option(
    "--weight-dtype", help="Type of the layers' weights: fp16, fp8, int4 ...; embedding and head keep 16 bits."
)
@click.option("--quantization", "-q", help="The same by vLLM's name: fp8, awq, gptq, mxfp4 ...")
@click.option("--reserve", help="Share of the card's memory held back.  [default: 10%]")
@click.option("--gpu-memory-utilization", type=float, help="Share of it that is used.  [default: 0.9; vllm 0.92]")
@sharding_options
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="What kvsim calibrate measured on this card, in place of stated constants of time.",
)
@click.option("--shared-prefix", help="First tokens that all sequences share, stored once.")
@json_option
def command(
    model_name: str,
    ctx: str | None,
    max_model_len: str | None,
    input_len: str | None,
    output_len: str | None,
    batch: int,
    specs: tuple[str, ...],
    dtype: str | None,
    kv_cache_dtype: str | None,
    engine: str | None,
    block_size: int | None,
    max_num_seqs: int | None,
    max_num_batched_tokens: int | None,
    gpu: str | None,
    weight_bits: float | None,
    weight_dtype: str | None,
    quantization: str | None,
    reserve: str | None,
    gpu_memory_utilization: float | None,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    data_parallel_size: int,
    decode_context_parallel_size: int,
    prefill_context_parallel_size: int,
    profile: Path | None,
    shared_prefix: str | None,
    as_json: bool,
    **shared: Value | None,
) -> int:
    """Bytes of the cache: stored, read per step, by purpose; what fits on a card, and the time of a token.

    Exit code 1 where nothing that was asked for fits the card.
    """
    tokens, prompt, output, longest = tokens_a_sequence(ctx, max_model_len, input_len, output_len)
    check_sizes(batch, tokens)
    sharding = Sharding(
        tensor_parallel_size,
        pipeline_parallel_size,
        data_parallel_size,
        decode_context_parallel_size,
        prefill_context_parallel_size,
    )
    card, sharding = choose_card(gpu, sharding)
    bits, quantized = choose_weights(weight_bits, weight_dtype, quantization)
    flags: dict[str, Any] = {
        "block_size": block_size,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "gpu_memory_utilization": gpu_memory_utilization,
        "tensor_parallel_size": sharding.tensor_parallel_size,
    }
    serving, notes = choose_engine(engine, card, flags)
    fixed = _constants(profile, card, serving, notes)
    share = held_share(serving, parse_reserve(reserve) if reserve is not None else None, gpu_memory_utilization)
    if max_num_seqs is not None and max_num_seqs < 1:
        raise ValueError(f"max-num-seqs {max_num_seqs}: allowed are 1 and above")
    prefix = parse_size(shared_prefix, "shared-prefix") if shared_prefix is not None else 0
    if prefix > tokens:
        raise ValueError(f"shared prefix {prefix:,}: allowed are 0 to the {tokens:,} tokens of a sequence")
    model = load_model(model_name)
    chosen = Chosen(model, specs, dtype, shared, kv_cache_dtype, serving)
    rows, left_out = chosen.weigh(model, batch, [tokens], prefix)
    notes = [*beyond(model, [tokens]), *notes, *left_out]
    deployments = [Deployment(model, row.method, serving, sharding, prefix) for row in rows]
    rank = stages(model, sharding)[0] if sharding != Sharding() else model
    notes += [f"{serving.name}: {line}" for line in serving.notes(rank, rows[0].method)]
    space: Room | None = None
    limits: list[tuple[int | None, int | None]] = []
    pools: list[Pool | None] = [None] * len(rows)
    if card is not None:
        overhead = serving.overhead(model, card)
        space = room(
            model,
            card,
            bits,
            share,
            quantized=quantized,
            overhead=overhead,
            overhead_band=getattr(serving, "overhead_band", None),
            sharding=sharding,
        )
        notes += space.notes
        limits = [_limits(each, tokens, batch, space, max_num_seqs) for each in deployments]
        pools = [_pool(each, space, longest) for each in deployments]
    if max_num_seqs is not None and batch > max_num_seqs * sharding.data_parallel_size:
        notes.append(f"a batch of {batch:,} is beyond --max-num-seqs {max_num_seqs:,}: the others wait")
    told = reserve is not None or gpu_memory_utilization is not None
    times = [
        _times(each, space, batch, prompt, output, bits, fixed, notes, told=told, most=max_num_seqs)
        for each in deployments
    ]
    ranks = [(each.rank_nbytes(batch, tokens), each.all_nbytes(batch, tokens)) for each in deployments]
    fits = [space is not None and own <= space.cache_nbytes for own, _ in ranks]
    code = 1 if space is not None and not any(fits) else 0
    notes = list(dict.fromkeys(notes))
    if as_json:
        inputs = inputs_object(
            model,
            batch,
            chosen,
            ctx=tokens,
            gpu=card.id if card else None,
            engine=serving.name,
            engine_options=options_object(serving),
            input_len=prompt,
            output_len=output,
            shared_prefix=prefix,
            **asdict(sharding),
        )
        out = envelope("estimate", inputs, notes) | {"model": model_object(model)}
        out["rows"] = [
            row_object(row) | {"rank_nbytes": own, "all_ranks_nbytes": total} | _times_object(time)
            for row, (own, total), time in zip(rows, ranks, times, strict=True)
        ]
        if space is not None:
            out["gpu"] = gpu_object(space, sharding.ranks)
            for entry, fit, (most, far), pool in zip(out["rows"], fits, limits, pools, strict=True):
                entry |= {"fits": fit, "max_batch": most, "max_ctx": far}
                if pool is not None:
                    entry["pool"] = _pool_object(pool)
        show_json(out)
        return code
    blocks = [text.heading(model), text.request(tokens, batch, serving.name, prefix), text.estimates(rows)]
    if sharding != Sharding():
        blocks.append(text.shares(rows, ranks, sharding))
    if space is not None:
        flag = "--reserve" if reserve is not None or serving.name != "vllm" else "--gpu-memory-utilization"
        blocks.append(text.fits(space, rows, fits, limits, sharding.ranks, flag))
        blocks += [text.pools(rows, pools), text.times(rows, times)]
    show(*blocks, text.notes(notes), text.not_modelled("estimate"))
    return code


def _limits(
    deployment: Deployment, tokens: int, batch: int, space: Room, max_num_seqs: int | None
) -> tuple[int | None, int | None]:
    """The largest batch and context."""
    most = largest_batch(deployment, tokens, space.cache_nbytes)
    if max_num_seqs is not None:
        cap = max_num_seqs * deployment.sharding.data_parallel_size
        most = cap if most is None else min(most, cap)
    return most, largest_context(deployment, batch, space.cache_nbytes)


def _pool(deployment: Deployment, space: Room, max_model_len: int) -> Pool | None:
    """vLLM's pool on the rank with the fewest blocks."""
    engine, sharding = deployment.engine, deployment.sharding
    if not isinstance(engine, Vllm):
        return None
    held = stages(deployment.model, sharding) if sharding != Sharding() else (deployment.model,)
    length = sharding.rank_tokens(max_model_len)
    pools = [engine.pool(stage, deployment.method, space.cache_nbytes, length) for stage in held]
    return min(pools, key=lambda pool: pool.num_gpu_blocks)


def _pool_object(pool: Pool) -> dict[str, Any]:
    return {
        "num_gpu_blocks": pool.num_gpu_blocks,
        "block_size": max(group.block_size for group in pool.groups),
        "block_nbytes": pool.block_nbytes,
        "kv_cache_tokens": pool.num_tokens,
        "max_model_len": pool.max_model_len,
        "max_concurrency": pool.concurrency,
    }


def _constants(profile: Path | None, card: Hardware | None, engine: Engine, notes: list[str]) -> Constants | None:
    """The constants that a profile measured on ``card`` for ``engine``, and a note of whose times they are; ``None``
    without one.

    Raises ``ValueError`` for a profile of another card or of a runtime that is not the engine's.
    """
    if profile is None:
        return None
    if card is None:
        raise ValueError("--profile is of a card: give --gpu too")
    from kvsim.latency.profile import load_profile

    measured = load_profile(profile)
    fixed = measured.constants(card)
    fixed.check_engine(engine.name)
    notes.append(measured.note(engine.name))
    return fixed


def _times(
    deployment: Deployment,
    space: Room | None,
    batch: int,
    prompt: int,
    output: int | None,
    bits: float | None,
    fixed: Constants | None,
    notes: list[str],
    *,
    told: bool,
    most: int | None,
) -> Times | None:
    """Seconds of a token and to the first, where a card is given and its figures are known.

    Without an ``output`` length those of one step at the context, and of one prompt alone; else a busy server's.
    ``told``: the share of the memory was, so that as many run as fit in it; ``most``: no more than these.
    """
    if space is None:
        return None
    from kvsim.latency.steps import decode_step, first_token, prefill, running, token_step, was_timed

    sharding = deployment.sharding
    replica, one = sharding.rank_batch(batch), replace(sharding, data_parallel_size=1)
    cached = deployment.shared_prefix if deployment.shared_prefix < prompt else 0
    model, method, card = deployment.model, deployment.method, space.hardware
    options: dict[str, Any] = {
        "weight_bits": bits,
        "tensor_parallel": sharding.tensor_parallel_size,
        "engine": deployment.engine.name,
        "profile": fixed,
    }
    try:
        if output is None:
            token = decode_step(model, method, card, replica, prompt, **options)
            first, held = prefill(model, card, 1, prompt, cached_tokens=cached, **options), float(replica)
        else:
            loads = (replica, prompt, output)
            held = running(model, method, card, *loads, **options)
            if told:
                room_for = largest_batch(replace(deployment, sharding=one), prompt + output // 2, space.cache_nbytes)
                held = float(replica if room_for is None else min(replica, max(1, room_for)))
            held = min(held, most or held)
            token = token_step(model, method, card, *loads, cached_tokens=cached, num_running=held, **options)
            first = first_token(model, method, card, *loads, cached_tokens=cached, num_running=held, **options)
    except ValueError as error:
        notes.append(f"no times: {error}")
        return None
    if sharding.pipeline_parallel_size > 1 or sharding.context_ranks > 1:
        notes.append("times are those of one stage's card holding all layers: pipeline and context are not in them")
    if not was_timed(deployment.engine.name):
        notes.append(f"{deployment.engine.name} was not timed: the times are those of vllm, sglang and trtllm")
    if held < replica:
        notes.append(f"{method.name}: {held:,.0f} of {replica:,} requests run at once, the others wait")
    return Times(token.seconds, first.seconds, token.bound, batch * held / replica)


def _times_object(times: Times | None) -> dict[str, Any]:
    """``tpot_seconds``, ``ttft_seconds`` and ``tokens_per_second`` with ``value``, ``low`` and ``high``; ``bound``."""
    if times is None:
        return dict.fromkeys(("tpot_seconds", "ttft_seconds", "tokens_per_second", "bound"))
    value, low, high = times.token
    rates = {"value": times.running / value, "low": times.running / high, "high": times.running / low}
    return {
        "tpot_seconds": {"value": value, "low": low, "high": high},
        "ttft_seconds": dict(zip(("value", "low", "high"), times.first, strict=True)),
        "tokens_per_second": rates,
        "bound": times.bound,
    }
