"""The command line: one module per command; `render` prints, nothing else does."""
