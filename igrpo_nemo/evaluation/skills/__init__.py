"""Evaluation on NeMo-Skills: settings, data, its `ns` command in its own environment, results.

Nothing here imports NeMo-Skills: it is called as a program, and its files are read and written.
"""
