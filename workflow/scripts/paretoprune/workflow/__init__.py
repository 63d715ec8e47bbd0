"""What the workflow is made of beside its rules."""
