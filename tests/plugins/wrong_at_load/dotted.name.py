"""Never runs: the name of a plugin has no dot."""
