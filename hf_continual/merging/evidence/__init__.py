"""What is told about a merge: report, model card, publishing."""
