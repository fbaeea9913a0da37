"""HF PEFT's own models in memory, from which a base and its adapters are taken over."""
