"""Checks of gradients and implementations on the user's machine."""
