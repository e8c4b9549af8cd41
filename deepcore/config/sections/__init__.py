"""Floor 1: the config's sections, one noun per file; a section is frozen data and knows nothing of its neighbours."""
