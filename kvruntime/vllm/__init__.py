"""kvruntime's methods inside vLLM: ``--attention-backend CUSTOM``, one plugin, no state a request.

    vllm serve MODEL --attention-backend CUSTOM --block-size 64 \\
        --additional-config '{"kvruntime": {"method": "kivi", "nbits": 2}}'

``vllm.general_plugins`` calls :func:`register` in every process of an engine.  Records are a full-attention cache of a
layer and its exact tokens, where the method keeps any, a sliding-window one, so that vLLM allocates, counts, shares,
preempts and frees both (:mod:`kvruntime.vllm.specs`).  :mod:`kvruntime.vllm.backend` attends,
:mod:`kvruntime.vllm.settings` reads the options and refuses what is not done, :mod:`kvruntime.vllm.windows` attends in
layers with a sliding window.  Without vLLM this module, ``settings`` and ``windows`` are imported, no other.
"""

from __future__ import annotations


def register() -> None:
    """The entry point, called any number of times: the backend's name CUSTOM, the specs' managers, the cache types."""
    from kvruntime.vllm.backend import take_name
    from kvruntime.vllm.specs import take_cache_dtypes, take_specs

    take_name()
    take_specs()
    take_cache_dtypes()


__all__ = ["register"]
