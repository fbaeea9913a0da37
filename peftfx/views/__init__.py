"""Views: ways of calling a model, with caches and soft prompts, and the capture of each way as a graph."""
