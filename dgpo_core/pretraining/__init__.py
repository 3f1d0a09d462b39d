"""How the models of the embedded world are built before anything else: reading, and the protocol."""
