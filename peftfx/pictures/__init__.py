"""Pictures of models with adapters."""
