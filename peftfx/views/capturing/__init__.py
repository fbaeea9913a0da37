"""What surrounds a capture: the choice of sides, and what is told of a failure."""
