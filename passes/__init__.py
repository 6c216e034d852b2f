"""Graph rewrites, one per file."""

if __name__ != "ditopt.passes":  # a second copy under a bare name would have types and registries of its own
    raise ImportError(f"this package is named 'ditopt.passes', not {__name__!r}: import it as ditopt.passes")
