"""Masks: what may be removed, and which of it is, as packed bits."""
