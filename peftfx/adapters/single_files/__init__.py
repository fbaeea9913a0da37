"""Adapters in one safetensors file, as kohya's trainers, LyCORIS and diffusers write them."""
