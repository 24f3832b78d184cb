"""The former place of `hf_continual.merging.methods.interpolate`; scripts that import from it still work."""

from hf_continual.named import former_place

__getattr__ = former_place(__name__, "hf_continual.merging.methods.interpolate")
