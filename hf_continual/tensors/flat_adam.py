"""Former location of `hf_continual.methods.kif.flat_adam`; imports from here still work."""

from hf_continual.named import former_place

__getattr__ = former_place(__name__, "hf_continual.methods.kif.flat_adam")
