"""From a kernel to a model's forward: the only package that knows torch.nn."""
