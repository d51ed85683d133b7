"""Inside `placement.stages` and `placement.front`: prices, bounds and the searches over cuts."""
