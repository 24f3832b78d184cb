"""Recurrent-KIF's fusion offline: two models, element by element, by what matters to each."""
