"""The backends, one package or module each; reached by name only, from ``persistence.registry``."""
