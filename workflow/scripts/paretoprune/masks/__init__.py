"""Masks: the units that may be removed, and packed bits that say which of them are kept."""
