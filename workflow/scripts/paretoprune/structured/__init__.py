"""Units that make a network smaller: coupled channels and heads, how they are cut, what they cost, and their re-fit."""
