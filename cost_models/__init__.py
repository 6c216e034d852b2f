"""What a decision costs at a site, in seconds, bytes and FLOPs."""

if __name__ != "ditopt.cost_models":  # a second copy under a bare name would have types and registries of its own
    raise ImportError(f"this package is named 'ditopt.cost_models', not {__name__!r}: import it as ditopt.cost_models")
