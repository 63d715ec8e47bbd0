"""The stages of the method in memory, one file each, for the workflow's scripts and the library alike."""
