"""Measurements that print a table beside a peer."""
