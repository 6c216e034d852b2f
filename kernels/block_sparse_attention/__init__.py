"""Attention to lists of key blocks: ``lists``, ``pooled`` others, ``reference`` in plain torch, ``cpu`` in C++."""
