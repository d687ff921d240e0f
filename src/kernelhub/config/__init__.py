"""KernelConfig: mappings as people write them, saved and loaded."""
