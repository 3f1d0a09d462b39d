"""Measurements that take too long for tests; each says how it is run."""
