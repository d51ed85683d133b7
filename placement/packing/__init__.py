"""Inside `placement.experts`: packings, their search, exact replica weights, bounds."""
