"""Differentiation methods, one file each."""
