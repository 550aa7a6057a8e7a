"""Which runs, where? Knows settings and the files that runs leave; never imports torch."""
