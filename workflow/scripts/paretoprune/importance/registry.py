"""The importance scores by name, and what each needs: readable without torch. `importance.scores` computes them."""

# What a score may need: `gradients` of the loss on labelled images, or `statistics` of the layers.
SCORE_NEEDS: dict[str, frozenset[str]] = {
    "magnitude": frozenset(),
    "taylor": frozenset({"gradients"}),
    "fisher": frozenset({"gradients"}),
    "lamp": frozenset(),
    "random": frozenset(),
    "curvature": frozenset({"statistics"}),
    "elimination": frozenset({"statistics"}),
}
