"""Inside `placement.migrate`: who takes what, in which order, and what the cut-over costs."""
