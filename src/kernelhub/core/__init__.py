"""Values and rules: no input or output, no torch, no clock."""
