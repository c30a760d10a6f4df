"""What weighs while it happens: live tensors, the allocator.  Unique storages: ``kvruntime/bench/harness/weigh.py``."""
