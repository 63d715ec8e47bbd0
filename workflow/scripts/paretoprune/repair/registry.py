"""The repairs by name, and what they ask for: readable without torch. `repair.repairs` says what each one does."""

# Whether re-fitted weights take the place of the masked ones, which needs layer statistics.
REPAIR_REFITS = {"none": False, "batchnorm": False, "reconstruct": True}
