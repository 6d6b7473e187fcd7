"""How the command line reads values and prints: options in, progress on stderr, results on stdout."""
