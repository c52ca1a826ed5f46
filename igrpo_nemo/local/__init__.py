"""The embedded engine: one process, PyTorch, CPU or one GPU. `trainer` is Algorithm 1."""
