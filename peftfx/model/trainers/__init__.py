"""What trainers ask of a model, and what they are given: callbacks, and a reference model over the same tensors."""
