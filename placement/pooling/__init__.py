"""Inside `placement.train` and `placement.simulate`: a pool of devices and its slots."""
