"""The stages of the method in memory, one file each; the workflow's scripts and the library call the same ones."""
