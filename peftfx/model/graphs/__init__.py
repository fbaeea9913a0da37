"""The graphs of a base: cached, derived for adapters, and dropped when the base or the adapters change."""
