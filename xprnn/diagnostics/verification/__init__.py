"""Comparison of every implementation with the equations in float64."""
