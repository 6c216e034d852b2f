"""Sparse attention patterns in units of the token geometry, one per file; ``registry`` names them all."""
