"""Expert shards at work: loads, who takes which rows, how a placement follows the load."""
