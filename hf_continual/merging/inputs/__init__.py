"""What a merge reads: checkpoints, adapters, quantised bases, and whether they fit together."""
