"""Attention to lists of key blocks, and to means of others: ``reference``, ``cpu`` in C++, ``triton`` for GPUs."""
