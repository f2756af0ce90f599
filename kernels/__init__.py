"""MUSE's operations: one file each with Triton code, eager implementation and registration.

The configuration of every launch is pinned in the JSON beside its file. Nothing here imports muse, and
nothing touches a GPU at import.
"""
