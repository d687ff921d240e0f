"""From `build.toml` to variants."""
