"""Graph: a captured program, and what its `get_attr` nodes may read: stored weights, recipes, slots."""

from peftfx.graph.graph import Graph, TensorSpec

__all__ = ["Graph", "TensorSpec"]
