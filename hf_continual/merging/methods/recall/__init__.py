"""RECALL: one weight per model and layer, found from representations."""
