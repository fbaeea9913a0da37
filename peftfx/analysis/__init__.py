"""Sites and roles, read from a graph by following the dataflow; nothing here knows an architecture."""
