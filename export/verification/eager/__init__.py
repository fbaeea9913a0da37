"""The model's own code as the reference of an export, with adapters on its modules."""
