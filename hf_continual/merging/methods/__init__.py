"""Ways of merging, one file each: what a method asks of the models and the rule it makes one tensor with."""
