"""Loops of a model's code during a capture: over tokens, and over the places where a mask is true."""
