"""Merge methods, one file each: what a method needs from the models, and the rule that merges one tensor."""
