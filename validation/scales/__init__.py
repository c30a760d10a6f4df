"""What weighs: unique storages, live tensors, the allocator."""
