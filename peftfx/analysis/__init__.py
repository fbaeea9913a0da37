"""Analysis: finds sites and their roles in a graph by following the dataflow, without knowing any architecture."""
