"""Attention without masks: ``reference`` in plain torch, ``cpu`` for processors with bfloat16 dot products."""
