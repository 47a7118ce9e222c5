"""Sparse QPs in NumPy and SciPy alone: what the worker processes run.

Nothing here imports torch or the engine, so that a worker starts in a moment and holds little memory.
"""
