"""recipes/proof."""
