"""KIVI on real tensors: reference, kernels, and the layer that uses them."""
