"""From files to the rows of a store: corpus -> documents -> windows -> rows."""
