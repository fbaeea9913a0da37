"""Views in which sites are found where the forward cannot be captured, or does not run all of a model."""
