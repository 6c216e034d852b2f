"""The mechanism of every recipe, against its published formula written out step by step."""
