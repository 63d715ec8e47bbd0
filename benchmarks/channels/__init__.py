"""Smaller networks of equal multiply-adds: what several tools choose, each choice under each repair."""
