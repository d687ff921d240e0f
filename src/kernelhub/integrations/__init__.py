"""Other libraries' models, made kernel-aware."""
