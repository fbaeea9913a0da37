"""Graph: a captured program, and the tensors that its `get_attr` nodes may read: stored weights, recipes, slots."""

from peftfx.graph.graph import Graph, TensorSpec

__all__ = ["Graph", "TensorSpec"]
