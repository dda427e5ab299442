"""Serving: an engine that batches rows of any recursion step in one pass of the shared block."""
