"""The data set of the demo."""
