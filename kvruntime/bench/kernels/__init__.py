"""``kvruntime bench kernels``: attention and packing, one kernel at a time."""
