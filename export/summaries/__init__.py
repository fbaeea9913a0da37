"""What is in directories, what two differ in, and what an export would be: told without running a model."""
