"""Generation: classes that let transformers' `generate` run on graphs, which compute each step."""
