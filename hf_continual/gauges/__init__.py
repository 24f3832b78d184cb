"""Retention measured during training: gauges on a handful of rows, and rules that act on them."""

from __future__ import annotations

from hf_continual.gauges.method import Gauges

__all__ = ["Gauges"]
