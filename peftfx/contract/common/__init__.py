"""Arithmetic that several methods have in common."""
