"""From a cell to per-sample rows, and from rows to numbers that can be trusted."""
