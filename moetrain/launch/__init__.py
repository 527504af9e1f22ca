"""Starting the ranks: on this machine, or through Slurm. Imports no torch; torchrun runs as a subprocess."""
