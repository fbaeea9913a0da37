"""Base models: load them from local directories, find out their tasks, and make example inputs."""
