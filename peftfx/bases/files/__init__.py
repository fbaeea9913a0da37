"""What a base is on disk: a folder of a config and safetensors files, or a GGUF file."""
