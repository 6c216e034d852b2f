"""Attention to lists of key blocks: ``lists``, ``reference`` in plain torch, ``cpu`` in C++, ``triton`` for GPUs."""
