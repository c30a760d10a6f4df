"""What several devices of one host take: all-reduces by size, and decode steps under transformers' tensor parallelism.

Each is run by as many processes as devices take part, whatever their number::

    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m validation all-reduce --record
    NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m validation tensor-parallel --record

On CPUs they run over gloo.  The first rank writes the rows, ``validation/results/ranks/<device>.json``.
"""
