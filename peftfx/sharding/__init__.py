"""Models whose tensors are sharded over processes: FSDP2, and DeepSpeed's ZeRO-3."""
