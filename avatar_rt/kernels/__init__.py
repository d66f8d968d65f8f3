"""Triton implementations of the ops, one module per family. Empty until a GPU kernel exists."""
