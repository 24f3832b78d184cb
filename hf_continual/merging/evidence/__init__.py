"""The documents of a merge: report, model card, publishing."""
