"""What is put right in a pruned network."""
