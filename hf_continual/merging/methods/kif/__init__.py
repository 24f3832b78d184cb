"""Offline fusion by Recurrent-KIF: two models, element by element, by what matters to each."""
