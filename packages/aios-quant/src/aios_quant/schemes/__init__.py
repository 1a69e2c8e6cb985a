"""How weights become codes: one file per scheme, `registry.find_scheme` finds them by name."""
